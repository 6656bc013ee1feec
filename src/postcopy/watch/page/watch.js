// Draws samples: from the server's events, or from the report that this script is in.
// A sample has the members that docs/watch.md lists; no member holds memory contents.

const MIB = 1048576;
const STATES = {
  s: "at-source", w: "on-its-way", i: "in-place", d: "dirty-again", a: "asked-for", z: "zero", l: "lost",
};
// What a vCPU may wait for; docs/watch.md has the same words.
const CAUSES = {
  page: "a page asked of the source, which comes on the main channel",
  preempt: "a page asked of the source, which comes on the channel for such pages",
  paused: "the connection is broken",
  recovery: "the connection is there again, and the sides compare what has come",
  engine: "an engine has died, and its successor waits for the source",
  image: "a page read from an image",
};
const samples = []; // each with its `number`, which only grows, and whether it is a `change` of the status
let step = 1; // as the server says it: other numbers are let go of, or a long run would not fit
let ended = false;
let connected = true;
let wanted = null; // the number of the sample to show; null: the newest
let due = false;

const part = (id) => document.getElementById(id);
const mib = (bytes, digits = 1) => (bytes / MIB).toFixed(digits);
const ms = (us) => `${(us / 1000).toFixed(2)} ms`;

// Of each figure its name in a sample, its label, and its value for a reader; null: not known.
const FIGURES = [
  ["phase", "phase", (s) => (s.round ? `${s.phase}, round ${s.round}` : s.phase)],
  ["status", "status", (s) => s.status],
  ["fraction", "progress", (s) => `${Math.floor(s.fraction * 100)} %`],
  ["rate_bytes", "bandwidth", (s) => `${mib(s.rate_bytes)} MiB/s`],
  ["dirty_rate_bytes", "dirty rate", (s) => `${mib(s.dirty_rate_bytes)} MiB/s`],
  ["transferred_bytes", "sent", (s) => `${mib(s.transferred_bytes)} MiB`],
  ["remaining_bytes", "remaining", (s) => `${mib(s.remaining_bytes)} MiB`],
  ["total_bytes", "memory", (s) => `${mib(s.total_bytes, 0)} MiB`],
  ["faults", "faults", (s) => String(s.faults)],
  ["faults_per_s", "faults a second", (s) => String(s.faults_per_s)],
  ["p50_us", "fault latency, p50", (s) => (s.p50_us === null ? null : ms(s.p50_us))],
  ["p99_us", "fault latency, p99", (s) => (s.p99_us === null ? null : ms(s.p99_us))],
  ["max_us", "fault latency, longest", (s) => (s.max_us === null ? null : ms(s.max_us))],
  ["expected_downtime_ms", "downtime, expected",
    (s) => (s.expected_downtime_ms === null || s.downtime_ms !== null ? null : `${s.expected_downtime_ms} ms`)],
  ["downtime_ms", "downtime", (s) => (s.downtime_ms === null ? null : `${s.downtime_ms.toFixed(1)} ms`)],
];

function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

function row(cells, heading) {
  const tr = document.createElement("tr");
  cells.forEach((value, n) => {
    const cell = document.createElement(n === 0 && heading ? "th" : "td");
    if (n === 0 && heading) cell.scope = "row";
    cell.textContent = value;
    tr.append(cell);
  });
  return tr;
}

// --- taking samples

function begin(header) {
  const sides = [["from", header.source], ["to", header.destination]].filter((side) => side[1]);
  text(part("who"), `${sides.map((side) => side.join(" ")).join(" ")}, ${header.began}`);
}

function stays(sample) {
  return sample.change || sample.number % step === 0;
}

function add(number, sample, change) {
  const newest = samples[samples.length - 1];
  if (newest && number <= newest.number) return; // the server has sent it again
  if (newest && !stays(newest)) samples.pop();
  samples.push({ ...sample, number, change });
  later();
}

// Keep what the server keeps of the past; so it does not matter when this page was opened.
function thin(wider) {
  step = wider;
  const kept = samples.filter((each, n) => stays(each) || n === samples.length - 1);
  samples.splice(0, samples.length, ...kept);
  later();
}

function later() {
  if (due) return;
  due = true;
  // A page that is not seen gets no frames; its words and figures go on.
  if (document.hidden) setTimeout(draw, 250);
  else requestAnimationFrame(draw);
}

function listen() {
  const events = new EventSource("events");
  events.addEventListener("header", (event) => begin(JSON.parse(event.data)));
  for (const kind of ["sample", "change"]) {
    events.addEventListener(kind, (event) => add(Number(event.lastEventId), JSON.parse(event.data), kind === "change"));
  }
  events.addEventListener("step", (event) => thin(JSON.parse(event.data)));
  events.addEventListener("end", () => { ended = true; later(); });
  events.addEventListener("open", () => { connected = true; later(); });
  events.addEventListener("error", () => { connected = false; later(); });
}

// --- drawing

function draw() {
  due = false;
  if (!samples.length) return;
  const last = samples.length - 1;
  const at = wanted === null ? last : Math.max(0, samples.findLastIndex((each) => each.number <= wanted));
  const sample = samples[at];
  const seen = samples.slice(0, at + 1);
  const shown = seen.slice(-601);
  drawWords(sample, at === last);
  drawTime(at, last, sample);
  drawFigures(sample);
  drawStatuses(seen);
  drawMap(sample);
  drawLines("rates", shown, [["rate_bytes", "--rate", "bandwidth"], ["dirty_rate_bytes", "--dirty", "dirty rate"]],
    (value) => `${mib(value)} MiB/s`);
  drawLines("faults", shown, [["faults_per_s", "--faults", "faults/s"]], String);
  drawHeat(shown);
  drawVcpus(shown);
  drawPast(seen);
}

function drawWords(sample, newest) {
  const meaning = sample.source || sample.destination || sample.status;
  const words = [meaning.startsWith(sample.phase) ? meaning : `${sample.phase}: ${meaning}`];
  if (sample.destination && sample.source) words.push(`at the destination: ${sample.destination}`);
  if (sample.waits_for) words.push(`waits for ${sample.waits_for}`);
  // Screen readers say each change, so a number that counts up is left out.
  text(part("words"), words.join("; "));
  const notes = [...sample.notes];
  if (ended && newest) notes.push("the run has ended");
  if (!connected && !ended) notes.push("the server does not answer; this page tries again");
  const list = part("notes");
  if (list.textContent !== notes.join("")) {
    list.replaceChildren(...notes.map((note) => {
      const item = document.createElement("li");
      item.textContent = note;
      return item;
    }));
  }
  part("fraction").value = sample.fraction;
}

function drawTime(at, last, sample) {
  const moment = part("moment");
  moment.max = last;
  moment.value = at;
  const seconds = `${(sample.t_ms / 1000).toFixed(1)} s`;
  moment.setAttribute("aria-valuetext", seconds);
  text(part("moment-text"), wanted === null ? `${seconds}, newest` : seconds);
}

function drawFigures(sample) {
  const rows = FIGURES.map(([name, label, format]) => [name, label, format(sample), sample[name]])
    .filter((each) => each[2] !== null);
  sample.blocktime_us.forEach((us, n) => rows.push([`blocktime_${n}`, `blocktime of vCPU ${n}`, ms(us), us]));
  const body = part("figures").tBodies[0];
  const names = rows.map((each) => each[0]).join();
  if (body.dataset.names !== names) {
    body.dataset.names = names;
    body.replaceChildren(...rows.map((each) => row([each[1], ""], true)));
  }
  rows.forEach(([name, , value, exact], n) => {
    const cell = body.rows[n].cells[1];
    text(cell, value);
    cell.dataset.name = name;
    cell.dataset.value = exact;
  });
}

function drawStatuses(seen) {
  const found = [];
  for (const sample of seen) {
    if (!found.length || found[found.length - 1][1] !== sample.status) found.push([sample.t_ms, sample.status]);
  }
  const list = part("statuses");
  const lines = found.map(([t, status]) => `${(t / 1000).toFixed(1)} s: ${status}`);
  if (list.children.length === lines.length && list.lastChild?.textContent === lines[lines.length - 1]) return;
  list.replaceChildren(...lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
}

// A canvas with one unit for one CSS pixel, emptied; null: it has no room.
function pen(id) {
  const canvas = part(id);
  const { width, height } = canvas.getBoundingClientRect();
  if (width < 2 || height < 2) return null;
  const scale = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "11px system-ui, sans-serif";
  const style = getComputedStyle(document.documentElement);
  return { canvas, context, width, height, colour: (name) => style.getPropertyValue(name).trim() };
}

function drawMap({ map }) {
  part("no-map").hidden = Boolean(map);
  part("map").hidden = !map;
  part("states").hidden = !map;
  if (!map) return;
  const body = part("states").tBodies[0];
  const known = Object.entries(STATES).filter(([, name]) => map.pages[name]);
  const names = known.map(([letter]) => letter).join();
  if (body.dataset.names !== names) {
    body.dataset.names = names;
    body.replaceChildren(...known.map(([letter, name]) => {
      const made = row([name, ""], true);
      made.cells[0].prepend(marked(letter));
      return made;
    }));
  }
  known.forEach(([, name], n) => {
    text(body.rows[n].cells[1], (map.pages[name] / 256).toFixed(1));
    body.rows[n].cells[1].dataset.pages = map.pages[name];
    body.rows[n].cells[1].dataset.state = name;
  });
  part("map").setAttribute("aria-label", `map of the memory, as the ${map.side} says it: ${
    known.map(([, name]) => `${name} ${(map.pages[name] / 256).toFixed(0)} MiB`).join(", ")}`);
  const p = pen("map");
  if (!p) return;
  const cells = map.cells;
  const columns = Math.max(1, Math.round(Math.sqrt((cells.length * p.width) / p.height)));
  const rows = Math.ceil(cells.length / columns);
  const [w, h] = [p.width / columns, p.height / rows];
  const gap = w > 4 && h > 4 ? 1 : 0;
  for (const letter of Object.keys(STATES)) {
    p.context.fillStyle = p.colour(`--${letter}`);
    for (let n = cells.indexOf(letter); n >= 0; n = cells.indexOf(letter, n + 1)) {
      p.context.fillRect((n % columns) * w, Math.floor(n / columns) * h, w - gap, h - gap);
    }
  }
}

// The times of the plots: from the first shown sample to the last.
function scale(shown, width) {
  const [from, to] = [shown[0].t_ms, shown[shown.length - 1].t_ms];
  return (t) => ((t - from) / Math.max(1, to - from)) * width;
}

function drawLines(id, shown, lines, format) {
  const last = shown[shown.length - 1];
  part(id).setAttribute("aria-label",
    lines.map(([name, , label]) => `${label} ${format(last[name])}`).join(", "));
  const p = pen(id);
  if (!p) return;
  const most = Math.max(1, ...lines.flatMap(([name]) => shown.map((each) => each[name])));
  const x = scale(shown, p.width);
  const y = (value) => p.height - 2 - (value / most) * (p.height - 6 - 13 * lines.length);
  for (const [name, colour] of lines) {
    p.context.strokeStyle = p.colour(colour);
    p.context.lineWidth = 2;
    p.context.beginPath();
    shown.forEach((each, n) => p.context[n ? "lineTo" : "moveTo"](x(each.t_ms), y(each[name])));
    p.context.stroke();
  }
  lines.forEach(([name, colour, label], n) => {
    const top = format(Math.max(...shown.map((each) => each[name])));
    p.context.fillStyle = p.colour(colour);
    p.context.fillText(`${label} ${format(last[name])}, at most ${top}`, 2, 11 + 13 * n);
  });
}

// Of each interval between two samples, how many faults each bucket of latency got.
function latencies(shown) {
  return shown.slice(1).map((each, n) => each.latency.map(
    (count, bucket) => Math.max(0, count - (shown[n].latency[bucket] ?? 0))));
}

function drawHeat(shown) {
  const last = shown[shown.length - 1];
  part("heat").setAttribute("aria-label", last.p99_us === null ? "no fault has been measured"
    : `latency of faults: half took no longer than ${ms(last.p50_us)}, 99 of 100 than ${ms(last.p99_us)}`);
  const p = pen("heat");
  if (!p || shown.length < 2) return;
  const columns = latencies(shown);
  const most = Math.max(1, ...columns.flat());
  const x = scale(shown, p.width - 44);
  const buckets = 22; // up to 4 s
  const h = (p.height - 4) / buckets;
  const y = (bucket) => p.height - 2 - (Math.min(buckets - 1, bucket) + 1) * h;
  columns.forEach((column, n) => {
    const [left, right] = [x(shown[n].t_ms), x(shown[n + 1].t_ms)];
    column.forEach((count, bucket) => {
      if (!count) return;
      p.context.fillStyle = `rgba(${p.colour("--heat")}, ${0.2 + (0.8 * Math.log1p(count)) / Math.log1p(most)})`;
      p.context.fillRect(44 + left, y(bucket), Math.max(1, right - left), h);
    });
  });
  p.context.fillStyle = p.colour("--dim");
  for (const [bucket, label] of [[3, "8 us"], [7, "128 us"], [10, "1 ms"], [13, "8 ms"], [17, "131 ms"], [20, "1 s"]]) {
    p.context.fillText(label, 2, y(bucket) + h);
  }
}

// What a vCPU waited for between two samples: the share of the time by cause, and of what it has waited until now.
function waits(before, after, vcpu) {
  const span = 1000 * Math.max(1, after.t_ms - before.t_ms);
  return Object.entries(after.blocktime_causes_us ?? {}).map(([cause, us]) => [cause,
    Math.max(0, (us[vcpu] ?? 0) - (before.blocktime_causes_us?.[cause]?.[vcpu] ?? 0)) / span])
    .filter(([, share]) => share > 0);
}

// The number of the interval in which the stop of the switch-over has become known; -1: none.
function stopOf(shown) {
  return shown.findIndex((each, n) => n > 0 && each.downtime_ms !== null && shown[n - 1].downtime_ms === null) - 1;
}

function drawVcpus(shown) {
  const last = shown[shown.length - 1];
  const count = last.blocktime_us.length;
  const stop = stopOf(shown);
  const stopped = stop < 0 ? "" : `stopped for the switch-over: ${last.downtime_ms.toFixed(1)} ms`;
  drawCauses(last, count, stopped);
  const said = last.blocktime_us.map((us, n) => [`vCPU ${n} has waited ${ms(us)}`,
    ...Object.entries(last.blocktime_causes_us ?? {}).filter(([, all]) => all[n]).map(([cause, all]) => `${cause} ${ms(all[n])}`),
  ].join(", "));
  part("vcpus").setAttribute("aria-label",
    [count ? said.join("; ") : "how long vCPUs wait is not known", ...(stopped ? [stopped] : [])].join("; "));
  const p = pen("vcpus");
  if (!p) return;
  const x = scale(shown, p.width - 44);
  const rows = Math.max(1, count);
  const h = Math.min(24, p.height / rows);
  const fill = (colour, from, to, top, height) => {
    p.context.fillStyle = p.colour(`--${colour}`);
    p.context.fillRect(44 + from, top, Math.max(1, to - from), height);
  };
  for (let vcpu = 0; vcpu < rows; vcpu += 1) {
    const ground = (vcpu + 1) * h - 1;
    p.context.fillStyle = p.colour("--dim");
    p.context.fillText(count ? `vCPU ${vcpu}` : "vCPUs", 2, vcpu * h + h / 2 + 4);
    shown.slice(1).forEach((each, n) => {
      const [left, right] = [x(shown[n].t_ms), x(each.t_ms)];
      let low = 0;
      for (const [cause, share] of waits(shown[n], each, vcpu)) {
        const height = Math.min(1 - low, share) * (h - 2);
        fill(cause, left, right, ground - low * (h - 2) - Math.max(3, height), Math.max(3, height));
        low = Math.min(1, low + share);
      }
      if (n === stop) fill("stopped", left, left + 2, ground - h + 2, h - 2);
    });
  }
}

// The legend, which has the colours' names and meanings and how long each vCPU has waited.
function drawCauses(last, count, stopped) {
  const known = Object.keys(CAUSES).filter((cause) => last.blocktime_causes_us?.[cause]);
  const vcpus = [...Array(Math.min(8, count)).keys()];
  part("causes").hidden = !known.length;
  part("stopped").hidden = !stopped;
  if (part("stopped").dataset.text !== stopped) {
    part("stopped").dataset.text = stopped;
    part("stopped").replaceChildren(marked("stopped"), stopped);
  }
  const body = part("causes").tBodies[0];
  const names = `${known.join()} ${vcpus.length}`;
  if (body.dataset.names !== names) {
    body.dataset.names = names;
    const heads = document.createElement("tr");
    heads.append(...["cause", ...vcpus.map((n) => `vCPU ${n}`)].map((name) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = name;
      return cell;
    }));
    part("causes").tHead.replaceChildren(heads);
    body.replaceChildren(...known.map((cause) => {
      const made = row([`${cause}: ${CAUSES[cause]}`, ...vcpus.map(() => "")], true);
      made.cells[0].prepend(marked(cause));
      return made;
    }));
  }
  known.forEach((cause, n) => vcpus.forEach((vcpu) => {
    const us = last.blocktime_causes_us[cause][vcpu] ?? 0;
    const cell = body.rows[n].cells[vcpu + 1];
    text(cell, ms(us));
    cell.dataset.cause = `${cause}_${vcpu}`;
    cell.dataset.value = us;
  }));
}

function marked(letter) {
  const mark = document.createElement("span");
  mark.className = `mark mark-${letter}`;
  return mark;
}

function drawPast(seen) {
  const body = part("past").tBodies[0];
  if (!body.closest("details").open) return;
  const rows = seen.filter((each, n) => n === seen.length - 1
    || Math.floor(each.t_ms / 1000) !== Math.floor(seen[n + 1].t_ms / 1000)).slice(-300);
  body.replaceChildren(...rows.map((each) => row([(each.t_ms / 1000).toFixed(1), each.status,
    mib(each.rate_bytes), mib(each.dirty_rate_bytes), mib(each.remaining_bytes), String(each.faults_per_s)], true)));
}

// --- the user

part("moment").addEventListener("input", (event) => {
  const at = Number(event.target.value);
  wanted = at >= samples.length - 1 ? null : samples[at].number;
  later();
});
part("now").addEventListener("click", () => { wanted = null; later(); });
part("past").closest("details").addEventListener("toggle", later);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
new ResizeObserver(later).observe(document.body);

const recorded = part("recorded");
if (recorded) {
  const { header, samples: all } = JSON.parse(recorded.textContent);
  begin(header);
  all.forEach((sample, number) => add(number, sample, false));
  ended = true;
} else {
  listen();
}
