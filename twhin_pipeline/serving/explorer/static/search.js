import { address, ask, count, entityLink, fill, given, make, metricsTable, releases, shown, table } from "./common.js";

const form = document.getElementById("form");
const [field, type] = [form.elements.q, form.elements.type];
const hits = document.getElementById("hits");
const status = document.getElementById("status");
const WAIT = 200; // milliseconds after a key before the server is asked
const MOST = 20; // of each type
let timer = 0;
let turn = 0;

async function search() {
  const mine = ++turn;
  const text = field.value.trim();
  const here = new URL(location.href);
  for (const [name, value] of [["q", text], ["type", type.value]]) {
    if (value) here.searchParams.set(name, value);
    else here.searchParams.delete(name);
  }
  history.replaceState(null, "", here);
  if (!text) {
    hits.replaceChildren();
    status.textContent = "";
    return;
  }
  try {
    const found = await ask("search", { q: text, type: type.value, count: MOST });
    if (mine !== turn) return; // a later key has asked again
    const alike = found.length > 0 && found.every((hit) => hit.how === "spelling");
    const more = found.some((hit) => found.filter((one) => one.entity === hit.entity).length === MOST);
    status.textContent = !found.length ? "Nothing found." : alike
      ? "No id has this text. These are spelled alike:"
      : more ? `The first ${count(found.length)}; there may be more.` : `${count(found.length)} found.`;
    hits.replaceChildren(...found.map((hit) => make("li", {},
      make("span", { class: "type" }, hit.entity), " ", entityLink(hit.entity, hit.id),
      hit.trained ? null : make("span", { class: "muted" }, " (no training edge)"))));
  } catch (error) {
    status.textContent = error.message;
    hits.replaceChildren();
  }
}

function types(release) {
  const columns = [
    ["Entity type", (one) => one.name],
    ["Entities", (one) => count(one.count), "number"],
    ["With training edges", (one) => count(one.trained), "number"],
    ["Dimension", (one) => count(one.dim), "number"],
    ["Map", (one) => (release.maps.includes(one.name) ? make("a", { href: address("map", { type: one.name }) }, `map of ${one.name}`) : "–")],
  ];
  return table(`Snapshot ${release.snapshot}${release.release ? `, release ${release.release}` : ""}`, columns, release.entities);
}

function measured(metric, rows) {
  const baselines = [["Popular", "baseline"], ["Item-kNN", "item_knn"], ["ALS", "als"]]
    .filter(([, column]) => rows.some((row) => row[column] !== null));
  const lower = metric.includes("mean_rank");
  const cell = (row, column) => {
    const values = ["value", ...baselines.map(([, name]) => name)].map((name) => row[name]).filter((value) => value !== null);
    const best = row[column] !== null && values.length > 1 && row[column] === (lower ? Math.min(...values) : Math.max(...values));
    return best ? make("strong", {}, shown(row[column])) : shown(row[column]);
  };
  const sorted = [...rows].sort((a, b) => (a.relation === "all") - (b.relation === "all") || b.edges - a.edges);
  return table(`${metric} by relation; the best in bold`, [
    ["Relation", (row) => row.relation],
    ["Edges", (row) => count(row.edges), "number"],
    ["Model", (row) => cell(row, "value"), "number"],
    ...baselines.map(([title, column]) => [title, (row) => cell(row, column), "number"]),
  ], sorted);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(timer);
  search();
});
field.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(search, WAIT);
});
type.addEventListener("change", search);

field.value = given("q");
const release = ask("release");
fill(document.getElementById("types"), release, (one) => {
  for (const entity of one.entities) type.append(make("option", { selected: entity.name === given("type") }, entity.name));
  return types(one);
});
fill(document.getElementById("metrics"), release, (one) => metricsTable(one.metrics, measured));
if (field.value) release.then(search, () => {});
else field.focus();
releases().catch(() => {}); // the tables above say why
