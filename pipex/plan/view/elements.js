// ---------------------------------------------------------------- elements

function element(name, attributes = {}, ...children) {
  const svg = /^(svg|g|path|rect|line|text|clipPath)$/.test(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Chunk 0 in the kind's full colour, the last chunk in its palest: names are readable on all of them. */
function shade(kind, chunk) {
  const share = chunks > 1 ? 100 - (55 * chunk) / (chunks - 1) : 100;
  return `color-mix(in oklab, var(--${kind}) ${share.toFixed(0)}%, var(--pale))`;
}

function swatch(...shapes) {
  return element("svg", { width: 22, height: 12, "aria-hidden": "true" }, ...shapes);
}

const filled = (kind, chunk = 0, y = 0, height = 12) =>
  element("rect", { width: 22, height, y, style: `fill: ${shade(kind, chunk)}` });

function legend() {
  const used = new Set(lanes.planned.flatMap((row) => row.parts.flat().map((part) => part.kind)));
  const items = Object.keys(KINDS)
    .filter((kind) => used.has(kind))
    .map((kind) => [swatch(filled(kind)), `${kind} ${KINDS[kind]}`]);
  if (lanes.planned.some((row) => row.parts.some((parts) => parts.length > 1)))
    items.push([swatch(filled("F", 0, 0, 6), filled("B", 0, 6, 6)), "run as one"]);
  for (let chunk = 0; chunks > 1 && chunk < chunks; chunk++)
    items.push([swatch(filled([...used][0], chunk)), `chunk ${chunk}`]);
  items.push([swatch(element("path", { class: "memory", d: "M0 12V8H6V3H16V7H22V12" })), "memory"]);
  const line = (name) => swatch(element("line", { class: name, x2: 22, y1: 6, y2: 6 }));
  if (page.limit) items.push([line("limit"), "memory limit"]);
  if (page.bound !== null) items.push([line("bound"), "bound"]);
  return items.map(([picture, text]) => element("span", {}, picture, text));
}

function button(text, name, action) {
  const made = element("button", { type: "button", title: name, "aria-label": name }, text);
  made.addEventListener("click", action);
  return made;
}

const pathSwitch = element("input", { type: "checkbox", checked: "" });
pathSwitch.addEventListener("change", () => redraw());
const axis = element("svg", { id: "axis", "aria-hidden": "true" });
const chart = element("svg", {
  id: "chart",
  tabindex: 0,
  role: "application",
  "aria-describedby": "hint",
  "aria-label": "timeline of the plan: arrow keys go from action to action",
});
const details = element("div", { id: "details", hidden: "" });
const spoken = element("div", { "aria-live": "polite", style: "position: absolute; clip-path: inset(50%)" });

const keys = [
  ["drag", "or", "Shift+←→", "move"],
  ["Ctrl+wheel", "or", "+", "−", "zoom"],
  ["0", "whole step"],
  ["←→", "action"],
  ["↑↓", "rank"],
  ["Enter", "go to what it waited for"],
  ["C", "critical path"],
];
const hint = element("div", { id: "hint" });
for (const words of keys) {
  const text = words.pop();
  hint.append(
    ...words.flatMap((word) => (word === "or" ? ["or "] : [element("kbd", {}, word), " "])),
    `${text} \u2003`,
  );
}

hint.append(
  element("br"),
  "Where actions are too narrow to be told apart, columns show the share of each kind in their time.",
);

document.getElementById("view").append(
  element(
    "div",
    { id: "bar" },
    element(
      "div",
      { id: "tools" },
      element(
        "span",
        {},
        button("−", "zoom out", () => zoom(1 / 1.6)),
        button("+", "zoom in", () => zoom(1.6)),
        button("whole step", "show the whole step", () => show(0, whole.to)),
      ),
      element(
        "label",
        {},
        pathSwitch,
        swatch(element("rect", { class: "critical", x: 1, y: 1, width: 20, height: 10 })),
        "critical path",
      ),
      ...legend(),
    ),
    axis,
  ),
  chart,
  hint,
  details,
  spoken,
);
