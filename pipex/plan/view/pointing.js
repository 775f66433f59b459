// ---------------------------------------------------------------- what is pointed at

let chosen = null; // { lane, rank, index }, by keyboard or click
let pointed = null; // the same, under the mouse

function outline() {
  const place = pointed ?? chosen;
  if (!place) return [];
  const row = lanes[place.lane][place.rank];
  const [x, end] = [Math.max(toX(row.start[place.index]), LEFT), Math.min(toX(row.end[place.index]), LEFT + width)];
  if (end < LEFT || x > LEFT + width) return [];
  return [
    element("rect", {
      class: "chosen",
      x: round(x),
      y: top[place.lane](place.rank),
      width: round(Math.max(end - x, 2)),
      height: size.bar,
    }),
  ];
}

/** The action at a place of the chart, or null. */
function actionAt(x, y) {
  const rank = Math.floor((y - 4) / band);
  if (rank < 0 || rank >= ranks || x < LEFT || x > LEFT + width) return null;
  const lane = Object.keys(lanes).find((name) => lanes[name] && y >= top[name](rank) && y < top[name](rank) + size.bar);
  if (!lane) return null;
  const index = firstAbove(lanes[lane][rank].end, toTime(x));
  return index < lanes[lane][rank].names.length && lanes[lane][rank].start[index] <= toTime(x)
    ? { lane, rank, index }
    : null;
}

function describe({ lane, rank, index }) {
  const row = lanes[lane][rank];
  const [start, end] = [row.start[index], row.end[index]];
  const facts = [
    ["does", row.parts[index].map(does).join(" and ")],
    ["rank", rank],
    [
      "stage",
      row.parts[index]
        .map((part) => (chunks > 1 ? `${part.stage} (chunk ${page.stages[rank].indexOf(part.stage)})` : part.stage))
        .join(", "),
    ],
    ["start", time(start)],
    ["end", time(end)],
    ["duration", time(end - start)],
  ];
  if (lane === "planned") {
    facts.push(["waited", waited(rank, index)]);
    const curve = page.memory[rank];
    facts.push(["rank holds", number(curve.held[firstAbove(curve.time, start) - 1])]);
  }
  const other = lanes[lane === "planned" ? "measured" : "planned"]?.[rank];
  const twin = other ? other.names.indexOf(row.names[index]) : -1;
  if (twin >= 0)
    facts.push([
      lane === "planned" ? "measured" : "planned",
      `${time(other.start[twin])} to ${time(other.end[twin])} (${time(other.end[twin] - other.start[twin])})`,
    ]);
  return {
    name:
      row.names[index] +
      (lane === "measured" ? ", measured" : critical.has(`${rank}/${index}`) ? ", on the critical path" : ""),
    facts,
  };
}

function does({ kind, microbatch }) {
  return `${KINDS[kind]} ${kind === "UPDATE" ? "with gradients up to" : "of"} micro-batch ${microbatch}`;
}

function waited(rank, index) {
  const row = lanes.planned[rank];
  const free = index ? row.end[index - 1] : 0;
  const producer = page.waits[rank][index];
  if (!producer) return index ? `no, it follows ${row.names[index - 1]}` : "no";
  const source = lanes.planned[producer[0]];
  const made = source.end[producer[1]];
  const hop = row.start[index] - made;
  const cause = `${source.names[producer[1]]} of rank ${producer[0]}, which ended at ${time(made)}`;
  // Times carry nine digits, so a hop of nothing may come out as a little more.
  return `${time(row.start[index] - free)} for ${cause}${hop > 1e-8 * whole.to ? `, and its hop of ${time(hop)}` : ""}`;
}

function showDetails(place, x, y) {
  details.hidden = !place;
  if (!place) return;
  const { name, facts } = describe(place);
  details.replaceChildren(
    element("strong", {}, name),
    element("dl", {}, ...facts.flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, String(value))])),
  );
  const box = details.getBoundingClientRect();
  const right = document.documentElement.clientWidth;
  const bottom = window.innerHeight;
  details.style.left = `${Math.max(4, x + 16 + box.width < right ? x + 16 : x - 16 - box.width)}px`;
  details.style.top = `${Math.max(4, y + 20 + box.height < bottom ? y + 20 : y - 20 - box.height)}px`;
}

/** Chooses an action, brings it into view and says what it is. */
function choose(place) {
  chosen = place;
  pointed = null;
  const row = lanes[place.lane][place.rank];
  const [start, end] = [row.start[place.index], row.end[place.index]];
  const span = seen.to - seen.from;
  if (start < seen.from || end > seen.to) show((start + end - span) / 2, (start + end + span) / 2);
  draw();
  const box = chart.getBoundingClientRect();
  const y = box.top + top[place.lane](place.rank);
  const hidden = document.getElementById("bar").offsetHeight;
  if (y < hidden) window.scrollBy(0, y - hidden - 8);
  else if (y + band > window.innerHeight) window.scrollBy(0, y + band - window.innerHeight);
  const [x, now] = [toX((start + end) / 2), chart.getBoundingClientRect().top + top[place.lane](place.rank)];
  showDetails(place, x, now + size.bar);
  const { name, facts } = describe(place);
  spoken.textContent = `${name}: ${facts.map((fact) => fact.join(" ")).join("; ")}`;
}

// ---------------------------------------------------------------- mouse and keyboard

let drag = null;

chart.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  drag = { x: event.clientX, from: seen.from, moved: false };
  chart.setPointerCapture(event.pointerId);
});

chart.addEventListener("pointermove", (event) => {
  const box = chart.getBoundingClientRect();
  if (drag) {
    const moved = event.clientX - drag.x;
    if (Math.abs(moved) > 3) drag.moved = true;
    if (!drag.moved) return;
    chart.classList.add("dragged");
    showDetails(null);
    const span = seen.to - seen.from;
    const from = drag.from - (moved / width) * span;
    show(from, from + span);
    return;
  }
  pointed = actionAt(event.clientX - box.left, event.clientY - box.top);
  chart.querySelector(".chosen")?.remove();
  chart.append(...outline());
  showDetails(pointed, event.clientX, event.clientY);
});

chart.addEventListener("pointerup", (event) => {
  const box = chart.getBoundingClientRect();
  if (drag && !drag.moved) chosen = actionAt(event.clientX - box.left, event.clientY - box.top);
  drag = null;
  chart.classList.remove("dragged");
});

chart.addEventListener("pointercancel", () => {
  drag = null;
  chart.classList.remove("dragged");
});

chart.addEventListener("pointerleave", () => {
  pointed = null;
  showDetails(null);
  redraw();
});

for (const area of [chart, axis]) {
  area.addEventListener(
    "wheel",
    (event) => {
      const sideways = event.shiftKey ? event.deltaX || event.deltaY : event.deltaX;
      if (event.ctrlKey || event.metaKey)
        zoom(Math.exp(-event.deltaY / 300), toTime(event.clientX - chart.getBoundingClientRect().left));
      else if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) pan(sideways / width);
      else return; // the page scrolls
      event.preventDefault();
      showDetails(null);
    },
    { passive: false },
  );
}

chart.addEventListener("dblclick", (event) => zoom(2, toTime(event.clientX - chart.getBoundingClientRect().left)));

/** The action of a rank that runs at a time, or the next one, or the last. */
function nearest(lane, rank, at) {
  const ends = lanes[lane][rank].end;
  return { lane, rank, index: Math.min(firstAbove(ends, at), ends.length - 1) };
}

function step(key) {
  if (!chosen) return choose(nearest("planned", 0, seen.from));
  const { lane, rank, index } = chosen;
  const row = lanes[lane][rank];
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const next = Math.min(Math.max(index + (key === "ArrowLeft" ? -1 : 1), 0), row.names.length - 1);
    return choose({ lane, rank, index: next });
  }
  // Up and down pass every row: planned, measured, next rank.
  const rows = lanes.measured ? ["planned", "measured"] : ["planned"];
  const at = rank * rows.length + rows.indexOf(lane) + (key === "ArrowUp" ? -1 : 1);
  if (at < 0 || at >= ranks * rows.length) return;
  choose(nearest(rows[at % rows.length], Math.floor(at / rows.length), row.start[index]));
}

function goToCause() {
  if (chosen?.lane !== "planned") return;
  const { rank, index } = chosen;
  const producer = page.waits[rank][index];
  if (producer) choose({ lane: "planned", rank: producer[0], index: producer[1] });
  else if (index) choose({ lane: "planned", rank, index: index - 1 });
}

/** The middle of the chosen action; undefined when there is none in sight. */
function chosenTime() {
  if (!chosen) return undefined;
  const row = lanes[chosen.lane][chosen.rank];
  const middle = (row.start[chosen.index] + row.end[chosen.index]) / 2;
  return middle >= seen.from && middle <= seen.to ? middle : undefined;
}

function move(by) {
  showDetails(null);
  by();
}

chart.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const sideways = { ArrowLeft: -0.2, ArrowRight: 0.2 }[event.key];
  if (event.key.startsWith("Arrow") && !(event.shiftKey && sideways)) step(event.key);
  else if (sideways) move(() => pan(sideways));
  else if (event.key === "+" || event.key === "=") move(() => zoom(1.6, chosenTime()));
  else if (event.key === "-" || event.key === "_") move(() => zoom(1 / 1.6, chosenTime()));
  else if (event.key === "0") move(() => show(0, whole.to));
  else if (event.key === "Enter") goToCause();
  else if (event.key === "c" || event.key === "C") pathSwitch.click();
  else if (event.key === "Escape") leave();
  else return;
  event.preventDefault();
});

function leave() {
  chosen = null;
  showDetails(null);
  redraw();
}

chart.addEventListener("blur", leave);

window.addEventListener("resize", redraw);
draw();
