import { address, ask, count, entityLink, fill, given, make, meter, releases, shown, table } from "./common.js";

const [type, id] = [given("type"), given("id")];
const place = (name) => document.getElementById(name);
const SOME = 10;
const MOST = 100;

/** Draw a relation as it is seen from a side: an arrow away from a head, towards a tail. */
function way(relation, side) {
  return make("span", { class: "way" }, side === "lhs" ? `—${relation}→` : `←${relation}—`);
}

/** Put "and" or "; " between groups of texts and elements. */
function joined(groups, between = " and ") {
  return groups.flatMap((group, at) => (at ? [between, ...group] : group));
}

function have(number) {
  return number === 1 ? "has" : "have";
}

const SAYS = {
  direct: (all, answer, tail) => ["Linked: ", ...joined(all.map((one) => [`${id} `, way(one.relation, one.side), ` ${tail}`]))],
  together: (all, { relation, lhs, rhs }) => [
    `Together with: of the ${count(all[0].heads)} other ${lhs} ${all[0].heads === 1 ? "entity" : "entities"} that ` +
      `${have(all[0].heads)} it by ${relation}, `,
    ...joined(all.map((one) => [`${count(one.shared)} ${have(one.shared)} `, entityLink(rhs, one.id)])), `, as ${id} does`],
  via: (all, answer, tail) => ["In between: ", ...joined(all.map((one) => {
    const same = one.relation === one.tail_relation && one.side === one.tail_side;
    const after = same ? [] : [" ", way(one.tail_relation, one.tail_side === "lhs" ? "rhs" : "lhs"), ` ${tail}`];
    return [same ? "both " : `${id} `, way(one.relation, one.side), " ", entityLink(one.entity, one.id), ...after,
      ` (${count(one.degree)} edges)`];
  }), "; ")],
  near: (all, { relation, lhs }) => ["Near by vector: ",
    ...joined(all.map((one) => [entityLink(lhs, one.id), ` (${shown(one.cosine, 2)})`]), ", "), ` ${have(all.length)} it by ${relation}`],
};

/** Say what speaks for a tail, a line for each kind of reason. */
function reasons(one, answer) {
  const kinds = Object.keys(SAYS).filter((kind) => one.reasons.some((each) => each.kind === kind));
  return kinds.map((kind) => make("li", {}, SAYS[kind](one.reasons.filter((each) => each.kind === kind), answer, one.id)));
}

function recommended(answer) {
  if (!answer.recommended.length) return make("p", {}, `There is no ${answer.rhs} left to recommend.`);
  const items = answer.recommended.map((one) => make("li", {},
    entityLink(answer.rhs, one.id), make("span", { class: "score" }, one.probability === null
      ? `score ${shown(one.score, 2)}` : `probability ${shown(one.probability, 3)}`),
    one.reasons.length
      ? make("ul", { class: "reasons" }, reasons(one, answer))
      : make("p", { class: "reasons" }, answer.edges
        ? "The vectors alone say so: nothing within two steps in the graph, and no near vector has it."
        : "The release has no edges any more, so there is no reason to show.")));
  return make("ol", { class: "plain recommended", "aria-label": `Recommended by ${answer.relation}` }, items);
}

function relationButtons(names) {
  const buttons = names.map((name) => make("button", {
    type: "button",
    "aria-pressed": "false",
    onclick: () => choose(name, buttons),
  }, name));
  place("relations").replaceChildren(...buttons);
  if (names.length) choose(names.includes(given("relation")) ? given("relation") : names[0], buttons);
  else place("recommendations").replaceChildren(make("p", { class: "muted" }, `No relation has heads of type ${type}, so nothing is recommended to one.`));
}

let turn = 0;

function choose(name, buttons) {
  const mine = ++turn;
  const here = new URL(location.href);
  here.searchParams.set("relation", name);
  history.replaceState(null, "", here);
  for (const one of buttons) one.setAttribute("aria-pressed", String(one.textContent === name));
  const element = place("recommendations");
  const waiting = ask("recommendations", { relation: name, id, count: SOME });
  fill(element, waiting, (answer) => (mine === turn ? recommended(answer) : [...element.childNodes]));
}

function linked(all) {
  if (all === null) return make("p", { class: "muted" }, "The release has no edges any more (retention removed them).");
  const some = all.filter((one) => one.count > 0);
  if (!some.length) return make("p", {}, "It has no edge.");
  return some.map((one) => {
    const list = make("ul", { class: "flow" }, one.ids.map((other) => make("li", {}, entityLink(one.entity, other))));
    const more = one.count > one.ids.length && one.ids.length < MOST
      ? make("button", { type: "button", onclick: (event) => showMore(event.currentTarget, one) },
        one.count > MOST ? `Show ${MOST} of ${count(one.count)}` : `Show all ${count(one.count)}`)
      : null;
    return make("div", {}, make("h3", {}, way(one.relation, one.side), ` ${one.entity} (${count(one.count)})`), list, more);
  });
}

async function showMore(button, one) {
  button.disabled = true;
  const all = await ask("entity", { type, id, count: MOST });
  const again = all.linked.find((each) => each.relation === one.relation && each.side === one.side);
  const list = button.previousElementSibling;
  list.replaceChildren(...again.ids.map((other) => make("li", {}, entityLink(one.entity, other))));
  list.querySelectorAll("a")[one.ids.length]?.focus();
  button.remove();
}

function nearest(all) {
  if (!all.length) return make("p", {}, "There is no other one with training edges.");
  return table("Cosine of the vectors", [
    [type, (one) => entityLink(type, one.id)],
    ["Cosine", (one) => make("span", {}, meter(one.cosine), shown(one.cosine)), "number"],
  ], all);
}

function past(all) {
  if (all.length < 2) return make("p", { class: "muted" }, "There is one release with vectors; the next one begins a history.");
  const unmapped = [...new Set(all.map((one) => one.why_unmapped).filter(Boolean))];
  return [
    make("p", { class: "muted" }, "Cosines are with the vector of the release that is shown: as they are, and after the map of the later " +
      "release into the earlier one's space. Retraining turns the axes, so the second says how far the entity itself has moved."),
    table("Releases, the newest first", [
      ["Release", (one) => make("span", { title: one.release }, one.snapshot)],
      ["Length", (one) => shown(one.norm, 2), "number"],
      ["Cosine", (one) => shown(one.cosine), "number"],
      ["Mapped", (one) => shown(one.mapped), "number"],
      ["Same nearest", (one) => (one.kept === null ? "–" : `${Math.round(100 * one.kept)} %`), "number"],
      ["Nearest then", (one) => (one.trained === null ? "not in this release"
        : one.neighbors.flatMap(([other], at) => [at ? ", " : null, entityLink(type, other, one.release)]))],
    ], [...all].reverse()),
    ...unmapped.map((why) => make("p", { class: "muted" }, `Not mapped: ${why}`)),
  ];
}

function origin(found) {
  const facts = [
    ["Row", count(found.row)], ["Length", shown(found.length, 3)], ["Training edges", count(found.trained_edges)],
    ["Edges", count(found.degree)], ["First seen", found.first_snapshot ?? "–"],
    ["Trained on held-out edges too", found.model.refit ? "yes (refit)" : "no"],
  ];
  return [
    make("dl", { class: "facts" }, facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))),
    table("Edges by relation", [
      ["Relation", (one) => way(one.relation, one.side)],
      ["In the graph", (one) => count(one.raw), "number"],
      ["Trained on", (one) => count(one.trained), "number"],
      ["Held out for the test", (one) => count(one.tested), "number"],
    ], found.edges),
    table("Tables, from the vectors down to the edges", [
      ["Table", (one) => one.table], ["Version", (one) => one.version], ["Made", (one) => one.created.slice(0, 16).replace("T", " ")],
    ], found.tables),
  ];
}

document.title = `${id} · TwHIN explorer`;
place("title").replaceChildren(id, make("small", {}, type));
const entity = ask("entity", { type, id, count: SOME });
fill(place("facts"), entity, (one) => {
  relationButtons(one.trained ? one.relations : []);
  const map = one.map && make("p", {}, make("a", { href: address("map", { type, id }) }, "Show on the map"));
  return one.trained ? map : make("p", { class: "note" }, "No training edge has this entity: its vector says nothing, so nothing is recommended to it.");
});
fill(place("linked"), entity, (one) => linked(one.linked));
fill(place("nearest"), entity, (one) => nearest(one.nearest));
fill(place("history"), entity.then(() => ask("history", { type, id })), past);
fill(place("origin"), entity.then(() => ask("origin", { type, id })), origin);
releases().catch(() => {});
