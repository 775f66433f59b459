// ---------------------------------------------------------------- data

const page = JSON.parse(document.getElementById("data").textContent);
const KINDS = {
  F: "forward",
  I: "input gradient",
  W: "weight gradient",
  B: "input and weight gradient",
  UPDATE: "update of the weights",
};
const ranks = page.planned.length;
const chunks = page.stages[0].length;

/** One rank: per action its text, the simple actions it consists of, start and end. */
function readRow({ actions, start, end }) {
  const names = actions.split(",");
  const parts = names.map((name) =>
    [...name.matchAll(/(\d+)([FIWB]|UPDATE)(\d+)/g)].map(([, stage, kind, microbatch]) => ({
      stage: +stage,
      kind,
      microbatch,
    })),
  );
  return { names, parts, start, end };
}

const lanes = { planned: page.planned.map(readRow), measured: page.measured?.map(readRow) };
const lastEnd = (rows) => Math.max(...rows.map((row) => row.end.at(-1)));
const critical = new Set(page.critical.map(([rank, position]) => `${rank}/${position}`));
const memoryTop = Math.max(...page.peak, ...(page.limit ?? [])) || 1;

const marks = [
  page.bound !== null && { name: "bound", time: page.bound, class: "bound" },
  { name: "planned end", time: lastEnd(lanes.planned), class: "end" },
  lanes.measured && { name: "measured end", time: lastEnd(lanes.measured), class: "end" },
].filter(Boolean);

// What is seen: a window of time. It never leaves the step, and holds at least one action.
const whole = { from: 0, to: 1.02 * Math.max(...marks.map((mark) => mark.time)) || 1 };
const shortest = Math.min(
  whole.to,
  ...lanes.planned.map((row) =>
    row.end.reduce((least, end, i) => {
      const takes = end - row.start[i];
      return takes > 0 ? Math.min(least, takes) : least;
    }, Infinity),
  ),
);
let seen = { ...whole };

function show(from, to) {
  const span = Math.min(Math.max(to - from, shortest), whole.to);
  const start = Math.min(Math.max(from, 0), whole.to - span);
  seen = { from: start, to: start + span };
  redraw();
}

function zoom(factor, around = (seen.from + seen.to) / 2) {
  show(around - (around - seen.from) / factor, around + (seen.to - around) / factor);
}

const pan = (share) => show(seen.from + share * (seen.to - seen.from), seen.to + share * (seen.to - seen.from));

/** The first index at which `values`, which rise, are above `value`. */
function firstAbove(values, value) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

function number(value) {
  return String(+value.toPrecision(6));
}

function time(value) {
  if (!page.seconds) return number(value);
  return value && Math.abs(value) < 1e-3
    ? `${+(value * 1e6).toPrecision(4)} µs`
    : `${+(value * 1e3).toPrecision(5)} ms`;
}
