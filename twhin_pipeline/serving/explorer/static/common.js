// What every page shares: asking the server, building elements, the choice of the release.
// Ids come from data, so text is only ever set as text; nothing here parses HTML.

const here = new URLSearchParams(location.search);

/** Return a parameter of the page's address, "" where it has none. */
export function given(name) {
  return here.get(name) ?? "";
}

/** Return an address with those parameters that are not empty; the release of this page stays. */
export function address(path, values = {}) {
  const query = new URLSearchParams();
  const kept = given("release");
  for (const [name, value] of Object.entries(kept ? { release: kept, ...values } : values)) {
    if (value !== "" && value !== null && value !== undefined) query.set(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/** Ask the server; throws an Error with its message where it refuses. */
export async function ask(path, values = {}) {
  const answer = await fetch(address(`api/${path}`, values));
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof body.error === "string" ? body.error : `the server answered ${answer.status}`);
  return body;
}

/** Make an element. A property that begins with "on" is a listener; null and false are left out. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

/** Return a number for people; "–" where there is none. */
export function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) && digits === 0 ? value.toLocaleString("en") : value.toFixed(digits);
}

/** Return a whole number with its thousands. */
export function count(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

/** Return a link to an entity's page. */
export function entityLink(type, id, release) {
  return make("a", { class: "id", href: address("entity", release ? { type, id, release } : { type, id }) }, id);
}

/** Return a table. A column is [title, cell of a row, "number" or nothing]; its cells are texts or elements. */
export function table(caption, columns, rows) {
  const head = columns.map(([title, , kind]) => make("th", { scope: "col", class: kind ?? null }, title));
  const body = rows.map((row) => make("tr", {}, columns.map(([, cell, kind], place) => {
    const content = cell(row);
    const made = place ? make("td", { class: kind ?? null }, content) : make("th", { scope: "row" }, content);
    if (content instanceof Element && content.dataset.cell) made.classList.add(content.dataset.cell);
    return made;
  })));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, head)), make("tbody", {}, body)));
}

/** Fill an element with what a promise brings; while it waits it is busy, and an error is shown in its place. */
export async function fill(element, promise, draw) {
  element.setAttribute("aria-busy", "true");
  try {
    const value = await promise;
    element.replaceChildren(...[await draw(value)].flat().filter(Boolean));
  } catch (error) {
    element.replaceChildren(make("p", { class: "error", role: "alert" }, error.message));
  } finally {
    element.removeAttribute("aria-busy");
  }
}

/** Offer the releases in the page's head, and keep the choice in the links between pages. Returns them. */
export async function releases() {
  const select = document.getElementById("release");
  const { shown: current, releases: all } = await ask("releases");
  const chosen = given("release") || current;
  for (const one of [...all].reverse()) {
    const state = one.state === "current" ? " (current)" : one.state === "held" ? " (held back)" : "";
    select.append(make("option", { value: one.release, selected: one.release === chosen }, `${one.snapshot}${state}`));
  }
  if (!all.length) select.append(make("option", {}, "newest vectors"));
  title(select, all);
  select.addEventListener("change", () => {
    here.set("release", select.value);
    location.search = here.toString();
  });
  for (const link of document.querySelectorAll("a[data-page]")) link.href = address(link.getAttribute("href"));
  return { current, chosen, all };
}

function title(select, all) {
  // Releases of one snapshot need their names to be told apart.
  const seen = new Map();
  for (const one of all) seen.set(one.snapshot, (seen.get(one.snapshot) ?? 0) + 1);
  for (const option of select.options) {
    const one = all.find((release) => release.release === option.value);
    if (one && seen.get(one.snapshot) > 1) option.textContent += `, made ${one.created.slice(0, 16).replace("T", " ")}`;
  }
}

/** Return a bar from 0 to 1, for the eye alone: the number stands beside it. */
export function meter(value) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const bar = document.createElementNS(space, "rect");
  svg.setAttribute("class", "meter");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("viewBox", "0 0 100 10");
  svg.setAttribute("preserveAspectRatio", "none");
  bar.setAttribute("height", "10");
  bar.setAttribute("width", String(100 * Math.min(Math.max(value ?? 0, 0), 1)));
  svg.append(bar);
  return svg;
}

/** Return the metrics of a release as a table of one metric, with a choice of it. */
export function metricsTable(rows, draw) {
  if (!rows.length) return make("p", { class: "muted" }, "This release has no evaluation.");
  const names = [...new Set(rows.map((row) => row.metric))];
  const depths = names.filter((name) => name.startsWith("recall@")).sort((a, b) => a.slice(7) - b.slice(7));
  const chief = depths.at(-1) ?? names[0];
  const select = make("select", { id: "metric" }, names.map((name) => make("option", { selected: name === chief }, name)));
  const place = make("div", {});
  const update = () => place.replaceChildren(draw(select.value, rows.filter((row) => row.metric === select.value)));
  select.addEventListener("change", update);
  update();
  return make("div", {}, make("p", {}, make("label", { for: "metric" }, "Metric"), " ", select), place);
}
