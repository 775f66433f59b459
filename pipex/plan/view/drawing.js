// ---------------------------------------------------------------- geometry, in pixels

const LEFT = 74;
const RIGHT = 74;
const COLUMN = 6; // width of the columns in which actions are added up
const CROWDED = 3; // a full row whose actions are narrower than this on average is drawn as columns
const size =
  ranks <= 8
    ? { bar: 26, memory: 26, gap: 14 }
    : ranks <= 16
      ? { bar: 20, memory: 18, gap: 10 }
      : { bar: 15, memory: 11, gap: 6 };
const band = size.bar * (lanes.measured ? 2 : 1) + (lanes.measured ? 6 : 4) + size.memory + size.gap;
const top = { planned: (rank) => 4 + rank * band, measured: (rank) => 4 + rank * band + size.bar + 2 };
const memoryBase = (rank) => 4 + (rank + 1) * band - size.gap;
const height = 4 + ranks * band;
let width = 0; // of the plot

const toX = (at) => LEFT + ((at - seen.from) / (seen.to - seen.from)) * width;
const toTime = (x) => seen.from + ((x - LEFT) / width) * (seen.to - seen.from);
const round = (value) => Math.round(value * 100) / 100;
/** Kept near the picture, since the coordinates of SVG are short of digits. */
const near = (x) => Math.min(Math.max(x, 0), LEFT + width + RIGHT);

// ---------------------------------------------------------------- drawing

const visible = (row) => [firstAbove(row.end, seen.from), firstAbove(row.start, seen.to)];

/** The actions of one rank as rectangles with names. */
function drawActions(row, rank, y, { boxes, names }) {
  for (let [i, end] = visible(row); i < end; i++) {
    const x = near(toX(row.start[i]));
    const wide = near(toX(row.end[i])) - x;
    const tall = size.bar / row.parts[i].length;
    row.parts[i].forEach((part, k) => {
      const chunk = page.stages[rank].indexOf(part.stage);
      const least = part.kind === "UPDATE" ? 2 : 0; // a planned one takes no time, and is to be seen all the same
      const drawn = Math.max(wide > 5 ? wide - 1 : wide, least);
      const box = `M${round(x)} ${y + k * tall}h${round(drawn)}v${tall}H${round(x)}z`;
      (boxes[shade(part.kind, chunk)] ??= []).push(box);
      const [from, to] = [Math.max(x, LEFT), Math.min(x + wide, LEFT + width)]; // what is seen of it
      const name = nameThatFits(part, to - from, tall);
      if (name) {
        const middle = (from + to) / 2;
        names.push(
          element("text", { class: "name", x: round(middle - 0.5), y: round(y + (k + 0.5) * tall + 4) }, name),
        );
      }
    });
  }
}

/** The actions of one rank as columns: the share of each kind in the column's time, above each other. */
function drawShares(row, y, areas) {
  const columns = Math.ceil(width / COLUMN);
  const sums = {};
  for (let [i, end] = visible(row); i < end; i++) {
    const x = toX(row.start[i]) - LEFT;
    const wide = toX(row.end[i]) - LEFT - x;
    for (const { kind } of row.parts[i])
      addUp((sums[kind] ??= new Float64Array(columns)), x, wide, row.parts[i].length);
  }
  const total = new Float64Array(columns);
  for (const kind of Object.keys(KINDS).filter((kind) => sums[kind])) {
    // An area reaches down to the base, behind those of the kinds below it.
    let d = `M${LEFT} ${y + size.bar}`;
    let last = 0;
    for (let c = 0; c < columns; c++) {
      total[c] += sums[kind][c];
      const up = round(Math.min(1, total[c]) * size.bar);
      if (up !== last) d += `H${LEFT + c * COLUMN}V${round(y + size.bar - up)}`;
      last = up;
    }
    areas[kind].push(`${d}H${LEFT + columns * COLUMN}V${y + size.bar}z`);
  }
}

function addUp(sum, x, wide, sharers) {
  for (let c = Math.max(0, Math.floor(x / COLUMN)); c < sum.length && c * COLUMN < x + wide; c++) {
    const covered = Math.min(x + wide, (c + 1) * COLUMN) - Math.max(x, c * COLUMN);
    if (covered > 0) sum[c] += covered / COLUMN / sharers;
  }
}

function nameThatFits({ stage, kind, microbatch }, wide, tall) {
  if (tall < 12) return null;
  const full = `${chunks > 1 ? stage : ""}${kind}${microbatch}`;
  return [full, microbatch].find((name) => 7 * name.length + 4 <= wide);
}

/** What a rank holds: per pixel the most, then what is left. */
function drawMemory(rank) {
  const { time: times, held } = page.memory[rank];
  const base = memoryBase(rank);
  const toY = (amount) => round(base - (amount / memoryTop) * size.memory);
  let i = Math.max(0, firstAbove(times, seen.from) - 1);
  let d = `M${LEFT - 2} ${base}V${toY(held[i])}`;
  for (i++; i < times.length && times[i] < seen.to; i++) {
    const x = Math.floor(toX(times[i]));
    let most = held[i];
    while (i + 1 < times.length && Math.floor(toX(times[i + 1])) === x) most = Math.max(most, held[++i]);
    d += `H${x}V${toY(most)}${held[i] < most ? `V${toY(held[i])}` : ""}`;
  }
  const shapes = [element("path", { class: "memory", d: `${d}H${LEFT + width + 2}V${base}` })];
  if (page.limit) {
    const y = toY(page.limit[rank]);
    shapes.push(element("line", { class: "limit", x1: LEFT, x2: LEFT + width, y1: y, y2: y }));
  }
  return shapes;
}

/** Outlines of what runs without a break on one rank, and lines for the messages between ranks. */
function drawCritical() {
  const runs = [];
  for (const [rank, position] of page.critical) {
    const row = lanes.planned[rank];
    const [x, end] = [toX(row.start[position]), toX(row.end[position])];
    const run = runs.at(-1);
    if (run?.rank === rank && x - run.end < 0.1) run.end = end;
    else runs.push({ rank, x, end, y: top.planned(rank), before: run });
  }
  const shapes = runs
    .filter(({ end, before }) => end > LEFT && (before?.end ?? 0) < LEFT + width)
    .map(({ x, end, y, before }) => {
      const message = before ? `M${round(before.end)} ${before.y + size.bar / 2}L${round(x)} ${y + size.bar / 2}` : "";
      return `${message}M${round(near(x))} ${y}H${round(near(end - 1))}v${size.bar}H${round(near(x))}z`;
    });
  return element("path", { class: "critical", d: shapes.join("") });
}

function draw() {
  width = Math.max(document.documentElement.clientWidth - LEFT - RIGHT, 100);
  const labels = [];
  const behind = [];
  const memory = [];
  const counts = Object.values(lanes)
    .flatMap((rows) => rows ?? [])
    .map(visible)
    .map(([first, end]) => end - first);
  const crowded = Math.max(...counts) > width / CROWDED;
  const drawn = { boxes: {}, areas: Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, []])), names: [] };
  for (let rank = 0; rank < ranks; rank++) {
    const y = top.planned(rank);
    labels.push(element("text", { x: 20, y: y + size.bar / 2 + 4 }, `rank ${rank}`));
    labels.push(
      element(
        "text",
        { class: "small", x: LEFT + width + 6, y: memoryBase(rank) - size.memory / 2 + 4 },
        `peak ${number(page.peak[rank])}`,
      ),
    );
    for (const [name, rows] of Object.entries(lanes)) {
      if (!rows) continue;
      behind.push(element("rect", { class: "lane", x: LEFT, y: top[name](rank), width, height: size.bar }));
      if (crowded) drawShares(rows[rank], top[name](rank), drawn.areas);
      else drawActions(rows[rank], rank, top[name](rank), drawn);
      if (lanes.measured)
        labels.push(
          element("text", { class: "small", x: LEFT + width + 6, y: top[name](rank) + size.bar / 2 + 4 }, name),
        );
    }
    memory.push(...drawMemory(rank));
  }
  const areas = Object.entries(drawn.areas)
    .reverse()
    .map(([kind, d]) => [shade(kind, 0), d]);
  const bars = [...areas, ...Object.entries(drawn.boxes)].map(([fill, d]) =>
    element("path", { style: `fill: ${fill}`, d: d.join("") }),
  );
  const clip = element("clipPath", { id: "plot" }, element("rect", { x: LEFT, y: 0, width, height }));
  const inside = element(
    "g",
    { "clip-path": "url(#plot)" },
    ...memory,
    ...bars,
    ...(pathSwitch.checked ? [drawCritical()] : []),
    ...drawn.names,
    ...markLines(0, height),
  );
  setSize(chart, height);
  chart.replaceChildren(clip, ...behind, ...gridLines(height), inside, ...labels, ...outline());
  drawAxis();
}

function setSize(svg, tall) {
  svg.setAttribute("width", LEFT + width + RIGHT);
  svg.setAttribute("height", tall);
}

/** Times at which the axis is marked: 1, 2 or 5 times a power of ten apart, at least 90 pixels. */
function ticks() {
  const least = ((seen.to - seen.from) / width) * 90;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= 0.999 * least); // rounding may leave the last one a little below
  const found = [];
  for (let k = Math.ceil(seen.from / step); k * step <= seen.to; k++) found.push(k * step);
  return found;
}

const vertical = (name, at, from, to) =>
  element("line", { class: name, x1: round(toX(at)), x2: round(toX(at)), y1: from, y2: to });
const gridLines = (tall) => ticks().map((at) => vertical("grid", at, 0, tall));
const markLines = (from, to) =>
  marks
    .filter(({ time: at }) => at >= seen.from && at <= seen.to)
    .map((mark) => vertical(mark.class, mark.time, from, to));

function drawAxis() {
  const row = 14;
  const tall = marks.length * row + 18;
  const drawn = ticks().map((at) =>
    element("text", { class: "small", x: round(toX(at)), y: tall - 5, "text-anchor": "middle" }, time(at)),
  );
  marks.forEach((mark, k) => {
    const x = toX(mark.time);
    if (mark.time < seen.from || mark.time > seen.to) return;
    const before = x > LEFT + width / 2;
    const place = {
      class: mark.class,
      x: round(x + (before ? -5 : 5)),
      y: (k + 1) * row - 3,
      "text-anchor": before ? "end" : "start",
    };
    drawn.push(
      vertical(mark.class, mark.time, k * row, tall),
      element("text", place, `${mark.name} ${time(mark.time)}`),
    );
  });
  setSize(axis, tall);
  axis.replaceChildren(...drawn);
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}
