// The dashboard of fastsae. Whatever comes from a model, a tokenizer or a file becomes a text node:
// nothing here parses HTML, and the page's policy would stop it.
"use strict";

const $ = (id) => document.getElementById(id);
const page = { about: null, wrapped: false, turn: 0, live: { text: "", latent: null, token: null } };

// ---- Elements ---------------------------------------------------------------------------------

/** Make an element; children that are no elements become text. */
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

function show(title, ...children) {
  document.title = `${title} · fastsae`;
  $("content").replaceChildren(...children.flat().filter((child) => child != null));
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").className = wrong ? "wrong" : "";
}

const number = (x, digits = 3) => (x == null ? "" : x === 0 ? "0" : Number(x.toPrecision(digits)).toLocaleString("en-US", { maximumSignificantDigits: digits }));
const count = (x) => x.toLocaleString("en-US");
const percent = (x) => (x === 0 ? "0%" : x < 1e-5 ? "<0.001%" : `${number(100 * x)}%`);
const chips = (tokens) => tokens.flatMap((token) => [el("code", {}, token), " "]);
const link = (latent, text) => el("a", { href: `#/latent/${latent}` }, text ?? String(latent));

// ---- Requests ---------------------------------------------------------------------------------

async function ask(path, parameters = {}, body = null) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value != null)).toString();
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(query ? `${path}?${query}` : path, options || {});
  } catch {
    throw new Error("the server does not answer; is `fastsae serve` still running?");
  }
  const value = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
  if (!answer.ok) throw new Error(value.error);
  return value;
}

// ---- Where we are -----------------------------------------------------------------------------

function place() {
  const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
  return { path: path || "/latents", given: Object.fromEntries(new URLSearchParams(query)) };
}

function address(path, given) {
  const query = new URLSearchParams(Object.entries(given).filter(([, value]) => value !== "" && value != null && value !== 0)).toString();
  return `#${path}${query ? `?${query}` : ""}`;
}

async function render() {
  const turn = ++page.turn;
  const { path, given } = place();
  const fresh = () => turn === page.turn;
  for (const [id, start] of [["to-latents", "/latent"], ["to-live", "/live"]]) {
    if (path.startsWith(start)) $(id).setAttribute("aria-current", "page");
    else $(id).removeAttribute("aria-current");
  }
  say("");
  for (const how of ["text", "explanation"]) if (path === "/latents" && given[how]) { $("how").value = how; $("query").value = given[how]; }
  document.body.removeAttribute("data-ready");
  try {
    page.about ??= await ask("/api/about");
    if (!fresh()) return;
    head();
    const latent = /^\/latent\/(\d+)$/.exec(path);
    if (latent) await latentPage(Number(latent[1]), fresh);
    else if (path === "/live") livePage(given);
    else if (path === "/latents" && given.text) await foundPage(given, fresh);
    else if (path === "/latents") await listPage(given, fresh);
    else throw new Error(`no such page: ${path}`);
  } catch (error) {
    if (!fresh()) return;
    show("Error");
    say(error.message, true);
  }
  if (fresh()) document.body.setAttribute("data-ready", path);
}

function head() {
  const { about } = page;
  const where = [about.model, about.site].filter(Boolean).join(", ");
  $("where").replaceChildren(el("b", {}, where || about.class), ` · ${about.class}, ${count(about.d_sae)} latents, ${count(about.silent)} silent on ${count(about.tokens)} tokens`);
  $("to-live").hidden = !about.live;
  const [text, explanation] = $("how").options;
  text.disabled = !about.text;
  explanation.disabled = !about.explained;
  if ($("how").selectedOptions[0].disabled) $("how").value = "number";
}

function previousAndNext(previous, next, what) {
  const one = (to, text, rel) => (to == null ? el("span", { class: "soft" }, text) : el("a", { href: to, rel }, text));
  return el("nav", { class: "steps", "aria-label": what }, one(previous, "← previous", "prev"), " ", one(next, "next →", "next"));
}

// ---- Lists of latents -------------------------------------------------------------------------

const COLUMNS = {
  latent: ["Latent", (row) => link(row.latent), "index", "asc"],
  rate: ["Fires on", (row) => percent(row.rate), "rate", "desc"],
  largest: ["Largest", (row) => number(row.largest), "largest", "desc"],
  strength: ["Strength", (row) => number(row.strength)],
  on_text: ["Largest here", (row) => number(row.on_text)],
  share: ["Of its windows", (row) => percent(row.share)],
  cosine: ["Cosine", (row) => number(row.cosine)],
  score: ["Score", (row) => number(row.score), "score", "desc"],
  peaks: ["Peaks on", (row) => chips(row.peaks)],
  explanation: ["Explanation", (row) => row.explanation ?? ""],
};

function table(rows, names, sorting) {
  if (!page.about.explained) names = names.filter((name) => name !== "score" && name !== "explanation");
  const heads = names.map((name) => {
    const [title, , key, first] = COLUMNS[name];
    if (!sorting || !key) return el("th", { scope: "col", class: name }, title);
    const now = sorting.sort === key;
    const order = now ? (sorting.order === "asc" ? "desc" : "asc") : first;
    const to = address("/latents", { ...sorting.given, sort: key, order, page: 0 });
    const sign = now ? (sorting.order === "asc" ? " ↑" : " ↓") : "";
    return el("th", { scope: "col", class: name, "aria-sort": now ? `${sorting.order}ending` : null }, el("a", { href: to }, title, sign));
  });
  const body = rows.map((row) => el("tr", {}, names.map((name) => el("td", { class: name }, COLUMNS[name][1](row)))));
  return el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, body)));
}

function pager(given, found) {
  const at = Number(given.page || 0);
  const first = at * page.about.page + 1;
  const to = (n) => address("/latents", { ...given, page: n });
  const shown = found.rows.length ? `${count(first)} to ${count(first + found.rows.length - 1)} of ${count(found.total)}` : "none here";
  const more = first + found.rows.length - 1 < found.total;
  return el("p", { class: "pager" }, el("span", { class: "soft" }, shown), previousAndNext(at > 0 ? to(at - 1) : null, more ? to(at + 1) : null, "Pages of the list"));
}

async function listPage(given, fresh) {
  const sort = given.sort || "index";
  const sorting = { sort, order: given.order || "asc", given };
  const found = await ask("/api/latents", given);
  if (!fresh()) return;
  const title = given.explanation ? `Explanations with “${given.explanation}”` : "Latents";
  show(title, el("h1", {}, title), scores(given, found.score), pager(given, found),
    table(found.rows, ["latent", "rate", "largest", "peaks", "score", "explanation"], sorting),
    given.explanation ? el("p", {}, el("a", { href: "#/latents" }, "All latents")) : null);
}

function scores(given, score) {
  if (page.about.scores.length < 2) return null;
  const options = page.about.scores.map((name) => el("option", { value: name, selected: name === score }, name));
  const change = (event) => { location.hash = address("/latents", { ...given, score: event.target.value, page: 0 }); };
  return el("p", {}, el("label", {}, "Score ", el("select", { on: { change } }, options)));
}

async function foundPage(given, fresh) {
  const found = await ask("/api/search", { text: given.text, page: given.page });
  if (!fresh()) return;
  const spelled = found.spellings.flatMap((tokens, i) => [i ? ", " : "", el("code", {}, tokens.join("·"))]);
  const title = `Fire on “${given.text}”`;
  show(title, el("h1", {}, title),
    el("p", { class: "soft" }, "Looked for ", spelled.length ? spelled : "nothing, as the tokenizer has no tokens for it,", ` in the ${page.about.width}-token windows kept of each latent. Strength: the largest activation on the text, over the latent's largest, averaged over its windows, 0 where the text is not. Of its windows: the share of those in which it fires that have it fire on the text.`),
    found.every > 1 ? el("p", { class: "soft" }, `The text is common: one in ${count(found.every)} of the windows that hold it was looked at, so strength and share are estimates.`) : null,
    pager(given, found),
    table(found.rows, ["latent", "strength", "share", "on_text", "largest", "rate", "peaks", "score", "explanation"]),
    el("p", {}, el("a", { href: "#/latents" }, "All latents")));
}

// ---- One latent -------------------------------------------------------------------------------

function shaded(text, act, scale, peak = false) {
  if (!act) return el("span", {}, text);
  const made = el("i", { class: peak ? "peak" : act < 0 ? "below" : null, title: number(act, 4) }, text);
  made.style.setProperty("--a", (0.08 + 0.62 * Math.min(1, Math.abs(act) / (scale || 1))).toFixed(3));
  return made;
}

function contexts(list, scale) {
  return el("ol", { class: "contexts" }, list.map(({ tokens, acts, peak }) => {
    const cells = tokens.map((token, i) => shaded(token, acts[i], scale, i === peak));
    return el("li", {}, el("span", { class: "v" }, number(acts[peak])),
      el("span", { class: "before" }, el("bdi", {}, cells.slice(0, peak))),
      el("span", { class: "after" }, el("bdi", {}, cells.slice(peak))));
  }));
}

function histogram({ edges, counts }) {
  const most = Math.max(...counts);
  const bars = counts.map((n, i) => {
    const [low, high] = [edges[i], edges[i + 1]];
    const range = low == null ? `below ${number(high)}` : high == null ? `${number(low)} and more` : `${number(low)} to ${number(high)}`;
    const bar = el("span", { title: `${range}: ${count(n)}` });
    bar.style.setProperty("--h", n / most);
    return bar;
  });
  const label = `Activations from ${number(edges[0]) || "0"} to ${number(edges[edges.length - 1]) || "the largest"}, ${count(most)} at most in a bin`;
  return el("figure", { class: "histogram" }, el("div", { role: "img", "aria-label": label }, bars),
    el("figcaption", {}, el("span", {}, number(edges[0])), el("span", {}, "activation, √2 wider from bin to bin"), el("span", {}, number(edges[edges.length - 1]))));
}

function words(title, tokens) {
  return el("p", {}, `${title} `, chips(tokens));
}

async function latentPage(latent, fresh) {
  const found = await ask(`/api/latents/${latent}`);
  if (!fresh()) return;
  const last = page.about.d_sae - 1;
  const facts = `Fires on ${percent(found.rate)} of tokens (${count(found.count)} of ${count(page.about.tokens)}) · largest ${number(found.largest)} · mean where it fires ${number(found.mean)}`;
  const known = Object.entries(found.scores).map(([name, value]) => `${name} ${number(value)}`).join(" · ");
  const logits = el("section", { id: "logits" });
  const nearest = el("section", { id: "nearest" });
  const wrap = el("button", { type: "button", "aria-pressed": String(page.wrapped), on: { click: () => {
    page.wrapped = !page.wrapped;
    wrap.setAttribute("aria-pressed", String(page.wrapped));
    body.classList.toggle("wrapped", page.wrapped);
  } } }, "Whole windows");
  const body = el("div", { class: page.wrapped ? "wrapped" : "" });
  if (found.top.length) {
    body.append(el("h2", {}, "Strongest windows"), contexts(found.top, found.scale));
    const parts = found.quantiles.filter((part) => part.length);
    if (parts.length) body.append(el("h2", {}, "From all windows in which it fires"));
    parts.forEach((part, i) => body.append(el("h3", {}, `Part ${i + 1} of ${parts.length}${i === 0 ? ", strongest" : i === parts.length - 1 ? ", weakest" : ""}`), contexts(part, found.scale)));
  }
  show(`Latent ${latent}`,
    el("h1", {}, `Latent ${latent}`),
    previousAndNext(latent > 0 ? `#/latent/${latent - 1}` : null, latent < last ? `#/latent/${latent + 1}` : null, "Latents"),
    el("p", { class: "soft" }, facts),
    found.explanation == null ? null : el("p", { class: "explanation" }, found.explanation, known ? el("span", { class: "soft" }, ` ${known}`) : null),
    page.about.live ? el("p", {}, el("a", { href: address("/live", { latent }) }, "Try it on a text")) : null,
    found.count ? histogram(found.histogram) : el("p", {}, `It fires on none of the ${count(page.about.tokens)} tokens that were sampled.`),
    found.top.length ? el("p", {}, "The fuller the shade, the stronger the activation; outlined is the strongest of its window. ", wrap) : null,
    body, logits, nearest);
  await Promise.all([
    fill(nearest, fresh, "Nearest by decoder", ask(`/api/latents/${latent}/nearest`), ({ rows, why }) => why ? el("p", { class: "soft" }, `Not shown: ${why}.`) : table(rows, ["latent", "cosine", "rate", "peaks", "score", "explanation"])),
    page.about.live ? fill(logits, fresh, "Logits", ask(`/api/latents/${latent}/logits`), ({ why, promoted, suppressed }) => why ? el("p", { class: "soft" }, `Not shown: ${why}.`) : [words("Raises", promoted), words("Lowers", suppressed)]) : null,
  ]);
}

/** Fill a section when its answer is here; a failure is said there, and the rest stays. */
async function fill(section, fresh, title, answer, make) {
  section.replaceChildren(el("h2", {}, title), el("p", { class: "soft" }, "…"));
  let made;
  try {
    made = make(await answer);
  } catch (error) {
    made = el("p", { class: "wrong" }, error.message);
  }
  if (fresh()) section.replaceChildren(el("h2", {}, title), ...[made].flat());
}

// ---- A text -----------------------------------------------------------------------------------

function livePage(given) {
  const { live } = page;
  if (!page.about.live) throw new Error("no model was given (--model), so no text can be tried");
  if (given.latent) live.latent = Number(given.latent);
  const text = el("textarea", { id: "text", rows: 5, "aria-label": "Text", spellcheck: "false", placeholder: "Type or paste some text." });
  text.value = live.text;
  const result = el("div", { id: "result" });
  const go = async () => {
    const turn = page.turn;
    live.text = text.value;
    say("running the model, which is loaded first if it is not there yet …");
    try {
      const found = await ask("/api/live", {}, { text: live.text, latent: live.latent });
      if (turn !== page.turn) return;
      say(found.note ?? "");
      live.latent = found.latent;
      result.replaceChildren(...liveResult(found, go));
      document.body.setAttribute("data-live", String(found.latent));
    } catch (error) {
      if (turn === page.turn) say(error.message, true);
    }
  };
  const enter = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); live.token = null; go(); } };
  text.addEventListener("keydown", enter);
  show("Try a text", el("h1", {}, "Try a text"), text,
    el("p", {}, el("button", { type: "button", id: "run", on: { click: () => { live.token = null; go(); } } }, "Run"), el("span", { class: "soft" }, " or Ctrl+Enter")), result);
  if (live.text) go();
}

function liveResult(found, again) {
  const { live } = page;
  const scale = Math.max(found.largest[found.latent] ?? 0, ...found.acts.map(Math.abs));
  const choose = (latent) => { live.latent = latent; again(); };
  const at = live.token;
  const tokens = found.tokens.map((token, i) => {
    const inside = shaded(token, found.acts[i], scale);
    const state = found.encoded[i] ? "" : " (left out: an outlier, as in the harvest)";
    return el("button", { type: "button", class: found.encoded[i] ? null : "out", "aria-pressed": String(i === at), title: `${number(found.acts[i] ?? 0, 4)}${state}`, on: { click: () => { live.token = i === live.token ? null : i; again(); } } }, inside);
  });
  const list = at == null ? found.overall : found.strongest[at] ?? [];
  const rows = list.map(({ latent, act, token }) => el("tr", { class: latent === found.latent ? "chosen" : null },
    el("td", { class: "latent" }, link(latent)),
    el("td", {}, number(act)),
    el("td", {}, found.largest[latent] ? percent(act / found.largest[latent]) : ""),
    at == null ? el("td", {}, el("code", {}, found.tokens[token])) : null,
    el("td", { class: "show" }, el("button", { type: "button", "aria-label": `Show latent ${latent} on the text`, on: { click: () => choose(latent) } }, "show")),
    el("td", { class: "explanation" }, found.explanations[latent] ?? "")));
  const heads = ["Latent", "Activation", "Of its largest", ...(at == null ? ["On"] : []), "On the text", page.about.explained ? "Explanation" : ""];
  const title = at == null ? "Strongest latents" : "Strongest latents on ";
  return [
    el("p", {}, found.latent == null ? "No latent is active." : ["Shaded by ", link(found.latent, `latent ${found.latent}`), found.explanations[found.latent] ? `: ${found.explanations[found.latent]}` : "", ". A token shows what is strongest on it."]),
    el("p", { class: "tokens" }, tokens),
    el("h2", {}, title, at == null ? null : el("code", {}, found.tokens[at])),
    el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, heads.map((text) => el("th", { scope: "col", class: text.toLowerCase() }, text)))), el("tbody", {}, rows))),
  ];
}

// ---- Keys and the form ------------------------------------------------------------------------

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const how = $("how").value;
  const query = $("query").value.trim();
  if (!query) return;
  if (how !== "number") location.hash = address("/latents", { [how]: query });
  else if (/^\d{1,15}$/.test(query)) location.hash = `#/latent/${Number(query)}`;
  else say(`expected the number of a latent, got ${query}`, true);
});

$("how").addEventListener("change", () => $("query").focus());

document.querySelector("[data-skip]").addEventListener("click", (event) => {
  event.preventDefault();
  $("content").focus();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (event.key === "/") $("query").focus();
  else if (event.key === "l") location.hash = "#/latents";
  else if (rel) document.querySelector(`a[rel="${rel}"]`)?.click();
  else return;
  event.preventDefault();
});

addEventListener("hashchange", () => { render(); scrollTo(0, 0); });
render();
