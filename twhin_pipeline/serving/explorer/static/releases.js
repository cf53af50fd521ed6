import { ask, count, entityLink, fill, given, make, metricsTable, releases, shown, table } from "./common.js";

const place = (name) => document.getElementById(name);
const form = place("form");
const who = place("who");
let known = [];

function decided(rows) {
  return table("The two releases", [
    ["Release", (one) => one.release],
    ["Made", (one) => one.created.slice(0, 16).replace("T", " ")],
    ["State", (one) => one.state],
    ["Why", (one) => one.reason ?? "–"],
    ["Model", (one) => one.model ?? "–"],
  ], rows);
}

function figures(pair) {
  const [before, after] = pair;
  if (!after.metrics.length) return make("p", { class: "muted" }, "The later release has no evaluation.");
  const earlier = new Map(before.metrics.map((row) => [`${row.relation} ${row.metric}`, row]));
  return metricsTable(after.metrics, (metric, rows) => {
    const lower = metric.includes("mean_rank");
    const change = (row) => {
      const then = earlier.get(`${row.relation} ${metric}`)?.value;
      if (then === null || then === undefined || row.value === null) return "–";
      const difference = row.value - then;
      const good = lower ? difference < 0 : difference > 0;
      return make("span", { class: difference === 0 ? null : good ? "better" : "worse" },
        `${difference > 0 ? "+" : ""}${shown(difference)}${difference === 0 ? "" : good ? " better" : " worse"}`);
    };
    const sorted = [...rows].sort((a, b) => (a.relation === "all") - (b.relation === "all") || b.edges - a.edges);
    return table(`${metric}, each release on its own held-out edges`, [
      ["Relation", (row) => row.relation],
      [before.snapshot, (row) => shown(earlier.get(`${row.relation} ${metric}`)?.value), "number"],
      [after.snapshot, (row) => shown(row.value), "number"],
      ["Change", change, "number"],
      ["Edges then", (row) => count(earlier.get(`${row.relation} ${metric}`)?.edges), "number"],
      ["Edges now", (row) => count(row.edges), "number"],
    ], sorted);
  });
}

function drifted(rows) {
  if (!rows.length) return make("p", { class: "muted" }, "The two have no entity type in common.");
  const apart = rows.some((one) => one.kept > 0 && one.cosine === null);
  const drift = table("Vectors of the later release beside those of the earlier one, on ids that both have trained", [
    ["Entity type", (one) => one.entity],
    ["Kept", (one) => count(one.kept), "number"],
    ["New", (one) => count(one.added), "number"],
    ["Departed", (one) => count(one.departed), "number"],
    ["Cosine", (one) => shown(one.cosine), "number"],
    ["After rotation", (one) => shown(one.aligned_cosine), "number"],
    ["Distance", (one) => shown(one.distance), "number"],
    ["Length", (one) => shown(one.length), "number"],
    ["Same 10 nearest", (one) => (one.neighbors === null ? "–" : `${Math.round(100 * one.neighbors)} %`), "number"],
  ], rows);
  return [drift, apart && make("p", { class: "muted" }, "Vectors of different dimensions cannot be compared.")];
}

async function both(pair, type, id) {
  const [before, after] = await Promise.all(pair.map((release) => ask("neighbors", { type, id, release, count: 20 })));
  if (!before.there && !after.there) throw new Error(`Neither release has the ${type} ${id}.`);
  const list = (one, other, words) => {
    const there = new Map(other.nearest.map((each, at) => [each.id, at]));
    const snapshot = known.find((each) => each.release === one.release)?.snapshot ?? one.release;
    if (!one.there) return make("div", {}, make("h3", {}, snapshot), make("p", {}, `This release does not have the ${type}.`));
    const rows = one.nearest.map((each, at) => ({ ...each, at, was: there.get(each.id) }));
    return make("div", {}, make("h3", {}, snapshot), table(`Nearest to ${id} in ${snapshot}`, [
      [type, (each) => entityLink(type, each.id, one.release)],
      ["Cosine", (each) => shown(each.cosine), "number"],
      ["In the other release", (each) => (each.was === undefined ? words : "also near")],
    ], rows));
  };
  return make("div", { class: "two" }, list(before, after, "no longer near"), list(after, before, "newly near"));
}

function show() {
  const pair = [form.elements.before.value, form.elements.after.value];
  const here = new URL(location.href);
  here.searchParams.set("before", pair[0]);
  here.searchParams.set("after", pair[1]);
  history.replaceState(null, "", here);
  const compared = ask("compare", { before: pair[0], after: pair[1] });
  place("decided").replaceChildren(decided(pair.map((name) => known.find((one) => one.release === name))));
  fill(place("metrics"), compared, (one) => figures(one.releases));
  fill(place("drift"), compared, (one) => drifted(one.drift));
  if (who.elements.id.value) showOne();
}

function showOne() {
  const pair = [form.elements.before.value, form.elements.after.value];
  const [type, id] = [who.elements.type.value, who.elements.id.value.trim()];
  const here = new URL(location.href);
  here.searchParams.set("type", type);
  here.searchParams.set("id", id);
  history.replaceState(null, "", here);
  fill(place("both"), both(pair, type, id), (one) => one);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show();
});
who.addEventListener("submit", (event) => {
  event.preventDefault();
  if (who.elements.id.value.trim()) showOne();
});

fill(place("metrics"), Promise.all([releases(), ask("release")]), ([{ all, chosen }, release]) => {
  known = all;
  for (const one of release.entities) who.elements.type.append(make("option", { selected: one.name === given("type") }, one.name));
  who.elements.id.value = given("id");
  if (all.length < 2) {
    form.hidden = who.hidden = true;
    document.getElementById("drift").replaceChildren(make("p", { class: "muted" }, "Nothing to compare yet."));
    return make("p", { class: "note" }, `This store has ${all.length === 1 ? "one release" : "no release"}; two can be compared.`);
  }
  const at = Math.max(all.findIndex((one) => one.release === chosen), 1);
  const wanted = { before: given("before") || all[at - 1].release, after: given("after") || all[at].release };
  for (const name of ["before", "after"]) {
    for (const one of [...all].reverse()) {
      form.elements[name].append(make("option", { value: one.release, selected: one.release === wanted[name] },
        `${one.snapshot}, made ${one.created.slice(0, 16).replace("T", " ")}${one.state === "current" ? " (current)" : ""}`));
    }
  }
  show();
  return [...place("metrics").childNodes];
});
