import { address, ask, count, entityLink, fill, given, make, releases, table } from "./common.js";

const place = (name) => document.getElementById(name);
const form = place("form");
const status = place("status");
// Okabe and Ito's colours (2008), of which each differs enough from both backgrounds.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a6fd1", "#7a8b3c"];
const DARK = window.matchMedia("(prefers-color-scheme: dark)");
const LABELS = 16; // of the largest clusters in view
const MEMBERS = 50; // of a cluster in the table, at a time
const STEP = 0.25; // of the view, for one press of a key

let points = null;
let plot = null;

/** Load the drawing; null where it was not built or the browser has no WebGL. */
async function drawing() {
  try {
    const { createScatterplot, checkSupport } = await import("./vendor/scatterplot.js");
    if (!document.createElement("canvas").getContext("webgl")) throw new Error("This browser has no WebGL, which draws the map.");
    checkSupport();
    return createScatterplot;
  } catch (error) {
    const why = error.message.startsWith("This browser") ? error.message
      : "The drawing of the map was not built into this installation: in a checkout, packaging/explorer.sh builds it (it needs npm).";
    place("frame").replaceWith(make("p", { class: "note" }, `${why} The table of clusters has the same points.`));
    return null;
  }
}

/** Fit coordinates into [-1, 1], the same scale on both axes. */
function fitted({ x, y }) {
  const span = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const [[left, right], [bottom, top]] = [span(x), span(y)];
  const scale = 1.9 / Math.max(right - left, top - bottom, 1e-9);
  return {
    x: Float32Array.from(x, (value) => (value - (left + right) / 2) * scale),
    y: Float32Array.from(y, (value) => (value - (bottom + top) / 2) * scale),
  };
}

/** Return the colours that differ between light and dark. */
function colours() {
  const background = getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).map((part) => Number(part) / 255);
  const chosen = DARK.matches ? "#ffffff" : "#000000";
  return { backgroundColor: [...background, 1], pointColorActive: chosen, pointColorHover: chosen };
}

function size(total) {
  return total > 50_000 ? 1.5 : total > 10_000 ? 2.5 : total > 1_000 ? 4 : 7;
}

/** Return the camera's distance from which all points are in view: it sees 1 up and down, and on a narrow map less to the sides. */
function farthest() {
  const { width, height } = place("canvas").parentElement.getBoundingClientRect();
  return Math.max(1, height / width);
}

async function draw(createScatterplot) {
  const canvas = place("canvas");
  place("frame").hidden = false;
  const { width, height } = canvas.parentElement.getBoundingClientRect();
  plot = createScatterplot({
    canvas, width, height, cameraDistance: farthest(), ...colours(), colorBy: "valueA", pointColor: COLOURS, opacity: 0.8,
    pointSize: size(points.id.length), pointSizeSelected: 6, lassoInitiator: false, spatialIndexUseWorker: false,
  });
  const { x, y } = points.fitted;
  await plot.draw({ x, y, valueA: points.cluster.map((cluster) => cluster % COLOURS.length) }, { zDataType: "categorical" });
  plot.subscribe("view", labelSoon);
  plot.subscribe("pointOver", (at) => hover(at));
  plot.subscribe("pointOut", () => hover(null));
  plot.subscribe("select", ({ points: [at] }) => select(at));
  plot.subscribe("deselect", () => select(null));
  new ResizeObserver(() => {
    const box = canvas.parentElement.getBoundingClientRect();
    plot.set({ width: box.width, height: box.height });
    label();
  }).observe(canvas.parentElement);
  DARK.addEventListener("change", () => plot.set(colours()));
  label();
  canvas.dataset.drawn = String(points.id.length); // tests wait for it
}

let labelling = false;

/** Write the names with the next frame, once however many events come before it. */
function labelSoon() {
  if (labelling) return;
  labelling = true;
  requestAnimationFrame(() => {
    labelling = false;
    label();
  });
}

/** Write the names of the largest clusters in view over the map, as far as they do not cover one another. */
function label() {
  const layer = place("labels");
  const { width, height } = layer.getBoundingClientRect();
  const taken = [];
  const made = [];
  for (const one of points.clusters) {
    const [x, y] = plot.getScreenPosition(one.middle) ?? [-1, -1];
    const wide = one.title.length * 7.6 + 12;
    const free = x >= 0 && y >= 0 && x + wide <= width && y + 22 <= height
      && taken.every(([a, b, w]) => x > a + w || x + wide < a || Math.abs(y - b) > 24);
    if (!free) continue;
    taken.push([x, y, wide]);
    const element = make("span", {}, one.title);
    element.style.transform = `translate(${x}px, ${y}px)`;
    made.push(element);
    if (made.length === LABELS) break;
  }
  if (points.marked !== null) {
    const [x, y] = plot.getScreenPosition(points.marked) ?? [-1, -1];
    if (x >= 0 && y >= 0 && x < width && y < height) {
      const element = make("span", { class: "here" }, points.id[points.marked]);
      element.style.transform = `translate(${x + 6}px, ${y + 6}px)`;
      made.push(element);
    }
  }
  layer.replaceChildren(...made);
}

function hover(at) {
  if (points.chosen === null) {
    points.marked = at;
    label();
  }
}

function select(at) {
  points.chosen = points.marked = at ?? null;
  if (at === null || at === undefined) {
    place("selected").replaceChildren();
  } else {
    const name = points.clusters.find((one) => one.number === points.cluster[at])?.title ?? "no cluster";
    place("selected").replaceChildren(make("p", {}, "Selected: ", entityLink(points.type, points.id[at]),
      ` (${count(points.trained_edges[at])} training edges; cluster ${name})`));
  }
  if (plot) label();
}

function move(how) {
  const [x, y] = plot.get("cameraTarget");
  const distance = plot.get("cameraDistance");
  const by = STEP * distance * 2;
  const to = {
    left: [[x - by, y], distance], right: [[x + by, y], distance], up: [[x, y + by], distance], down: [[x, y - by], distance],
    in: [[x, y], distance / 1.5], out: [[x, y], distance * 1.5], all: [[0, 0], farthest()],
  }[how];
  plot.zoomToLocation(...to, { transition: !matchMedia("(prefers-reduced-motion: reduce)").matches, transitionDuration: 150 });
}

const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", "+": "in", "=": "in", "-": "out", 0: "all",
};

function clusters() {
  return table(`${points.type}: ${count(points.id.length)} of ${count(points.entities)} entities, most trained first, in ` +
    `${points.clusters.length} clusters`, [
    ["Cluster, by what it is linked with most", (one) => one.title],
    ["Entities", (one) => count(one.members.length), "number"],
    ["For example", (one) => one.members.slice(0, 4).flatMap((at, i) => [i ? ", " : null, entityLink(points.type, points.id[at])])],
    ["Look", (one) => make("span", { class: "buttons" },
      make("button", { type: "button", "aria-label": `List cluster ${one.title}`, onclick: () => members(one) }, "List"),
      plot && make("button", { type: "button", "aria-label": `Show cluster ${one.title} on the map`, onclick: () => zoom(one) }, "Show"))],
  ], points.clusters);
}

function members(one, from = 0) {
  const part = one.members.slice(from, from + MEMBERS);
  const page = (text, to) => make("button", { type: "button", disabled: to < 0 || to >= one.members.length, onclick: () => members(one, to) }, text);
  place("members").replaceChildren(
    make("h3", {}, `${one.title}: ${count(from + 1)} to ${count(from + part.length)} of ${count(one.members.length)}`),
    make("ul", { class: "flow" }, part.map((at) => make("li", {}, entityLink(points.type, points.id[at])))),
    make("div", { class: "buttons" }, page("Earlier", from - MEMBERS), page("More", from + MEMBERS)));
  place("members").focus();
}

function zoom(one) {
  plot.zoomToPoints(one.members, { padding: 0.3 });
  place("canvas").focus();
}

/** Gather the clusters with their members, the largest first; `middle` is the member nearest to their mean. */
function gathered({ cluster, names, fitted: { x, y } }) {
  const byNumber = new Map();
  cluster.forEach((number, at) => {
    if (!byNumber.has(number)) byNumber.set(number, []);
    byNumber.get(number).push(at);
  });
  return [...byNumber].map(([number, members]) => {
    const mean = (values) => members.reduce((sum, at) => sum + values[at], 0) / members.length;
    const [a, b] = [mean(x), mean(y)];
    const away = (at) => (x[at] - a) ** 2 + (y[at] - b) ** 2;
    const middle = members.reduce((best, at) => (away(at) < away(best) ? at : best));
    return { number, members, middle, title: names[number] || `cluster ${number + 1}` };
  }).sort((a, b) => b.members.length - a.members.length);
}

async function open(type) {
  status.textContent = `Loading the map of ${type} …`;
  const loaded = await ask("map", { type });
  points = { ...loaded, type, fitted: fitted(loaded), chosen: null, marked: null };
  points.clusters = gathered(points);
  status.textContent = `${count(points.id.length)} points by ${points.method}.`;
  place("ids").replaceChildren(...points.id.slice(0, 500).map((value) => make("option", { value })));
  const createScatterplot = await drawing();
  if (createScatterplot) await draw(createScatterplot);
  if (given("id")) find(given("id"));
  return clusters();
}

function find(id) {
  const lowered = id.trim().toLowerCase();
  let at = points.id.indexOf(id.trim());
  if (at < 0) at = points.id.findIndex((one) => one.toLowerCase().startsWith(lowered));
  if (at < 0) {
    status.textContent = `No point of this map has an id that begins with ${id}.`;
    return;
  }
  status.textContent = `Found ${points.id[at]}.`;
  if (plot) {
    plot.select([at], { preventEvent: true });
    plot.zoomToLocation([points.fitted.x[at], points.fitted.y[at]], 0.15);
  }
  select(at);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (points && form.elements.find.value.trim()) find(form.elements.find.value);
});
form.elements.type.addEventListener("change", () => {
  location.href = address("map", { type: form.elements.type.value });
});
for (const button of document.querySelectorAll("[data-move]")) button.addEventListener("click", () => move(button.dataset.move));
place("canvas").addEventListener("keydown", (event) => {
  if (plot && KEYS[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    move(KEYS[event.key]);
  }
});

fill(place("clusters"), ask("release"), (release) => {
  const types = release.maps;
  const wanted = given("type") || types[0];
  for (const name of new Set([...types, ...(wanted ? [wanted] : [])])) form.elements.type.append(make("option", { selected: name === wanted }, name));
  if (!wanted) {
    form.hidden = true;
    return make("p", { class: "note" }, "This release has no map. Name entity types in maps.entities of the configuration; " +
      `then "twhin map --snapshot ${release.snapshot}" makes their maps.`);
  }
  return open(wanted);
});
releases().catch(() => {});
