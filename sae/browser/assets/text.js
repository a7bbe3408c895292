"use strict";
/* A text of one's own: what each token excites, and what the model says when features are changed. */
(() => {
  const { el, number, percent, visible, link, chip, shade, address, keep, say } = SAE;
  const EXAMPLE = "def area(self):\n    return self.width * self.height";
  const KEPT = 2000, MOST = 8, CELLS = 256;

  function page(main, { dictionary: d, query }) {
    if (!SAE.served()) {
      main.replaceChildren(el("h1", {}, "Text"), el("p", {}, "Reading a text of your own needs the model, so it needs the server. In a terminal:"), el("p", {}, el("code", { id: "command" }, SAE.index[d].command)));
      return;
    }
    const s = { text: query.get("t") ?? EXAMPLE, changes: changesOf(query.get("c")), tokens: [], at: null, table: null };
    const box = el("textarea", { id: "text", rows: 4, spellcheck: "false", "aria-label": "Text", value: s.text });
    const read = el("button", { type: "submit", id: "read" }, "Read"), state = el("span", { class: "quiet", role: "status", id: "state" });
    const shown = el("div", { class: "card wide context", id: "tokens", hidden: true }), about = el("div", { class: "card wide", id: "token-features", hidden: true });
    const strongest = el("div", { class: "card wide", id: "strongest", hidden: true }), steering = el("section", { class: "card wide steering", "aria-label": "Change features" }), result = el("div", { class: "sides", id: "sides" });
    main.replaceChildren(el("div", { class: "page-head" }, el("h1", {}, "Text"), el("p", { class: "quiet" }, "What each token excites, and what the model says when features are changed.")),
      el("form", { class: "read-form", onsubmit: (e) => { e.preventDefault(); run(); } }, box, el("div", { class: "tools" }, read, state)), shown, about, strongest, steering, result);
    box.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) run(); });
    const remember = () => keep(address(d, "text", { t: s.text.slice(0, KEPT), c: s.changes.map((c) => `${c.feature}:${c.scale}:${c.times}`).join(" ") }));

    async function working(what, task) {
      const start = performance.now(), timer = setInterval(() => { state.textContent = `${what} … ${Math.round((performance.now() - start) / 1000)} s`; }, 200);
      state.textContent = `${what} …`;
      read.disabled = true;
      try { await task(); state.textContent = ""; } catch (error) { state.textContent = error.message; say(error.message); }
      clearInterval(timer);
      read.disabled = false;
    }
    const run = () => working("Reading", async () => {
      s.text = box.value;
      remember();
      s.table = await SAE.list.table(d);
      s.tokens = (await SAE.ask("read", { dictionary: d, text: s.text })).tokens;
      s.at = null;
      drawTokens();
      drawStrongest();
      drawChanges();
    });

    /** Every token shaded by its strongest feature, measured against that feature's own maximum. */
    const share = (f, act) => { const p = SAE.list.placeOf(s.table, f); return act / ((p !== undefined && s.table.max[p]) || act || 1); };
    function drawTokens() {
      shown.hidden = false;
      shown.replaceChildren(...s.tokens.flatMap(([piece, features], i) => {
        const own = s.only === undefined ? Math.max(0, ...features.map(([f, a]) => share(f, a))) : features.filter(([f]) => f === s.only).reduce((_, [f, a]) => share(f, a), 0);
        const token = shade(el("button", { type: "button", class: "token", "aria-pressed": String(i === s.at), onclick: () => { s.at = i; drawTokens(); drawFeatures(); } }, visible(piece).replace(/^␣+$/, (x) => " ".repeat(x.length)) || "∅"), own);
        return piece.includes("\n") ? [token, el("br")] : [token];
      }));
    }
    const label = (f) => { const found = s.table.labels.get(f); return found ? el("span", { class: "quiet" }, " " + found.text) : null; };
    /** A feature over the tokens of the text, from left to right. */
    const strip = (f) => el("span", { class: "strip", "aria-hidden": "true" }, s.tokens.slice(0, CELLS).map(([, features]) => {
      const found = features.find(([g]) => g === f);
      return el("i", { css: { "--share": found ? Math.min(1, share(f, found[1])).toFixed(2) : 0 } });
    }));
    function line(f, act, withStrip = false) {
      const item = el("li", { class: "read", css: { "--share": Math.min(1, share(f, act)).toFixed(3) } }, el("span", {}, link(d, f), label(f)), withStrip ? strip(f) : null, el("span", { class: "num" }, number(act), " ",
        el("button", { type: "button", class: "plain", "aria-label": `Ablate feature ${f}`, onclick: () => change(f, 0, 0) }, "ablate"), el("button", { type: "button", class: "plain", "aria-label": `Amplify feature ${f}`, onclick: () => change(f, 1, 1) }, "amplify")));
      item.addEventListener("pointerenter", () => { s.only = f; drawTokens(); });
      item.addEventListener("pointerleave", () => { s.only = undefined; drawTokens(); });
      return item;
    }
    function drawFeatures() {
      const [piece, features] = s.tokens[s.at];
      about.hidden = false;
      about.replaceChildren(el("h2", {}, "On ", chip(piece)), features.length ? el("ol", { class: "token-list" }, features.map(([f, a]) => line(f, a))) : el("p", { class: "quiet" }, "a special token, or nothing fires here"));
    }
    function drawStrongest() {
      const best = new Map();
      for (const [, features] of s.tokens) for (const [f, a] of features) if (!(best.get(f) >= a)) best.set(f, a);
      const top = [...best].sort((a, b) => share(...b) - share(...a)).slice(0, MOST);
      strongest.hidden = !top.length;
      strongest.replaceChildren(el("h2", {}, "Strongest in this text", el("small", {}, "against each one's own maximum; each strip is the text from left to right")), el("ol", { class: "token-list" }, top.map(([f, a]) => line(f, a, true))));
    }

    /* ------------------------------------------------------------------------------ changing */

    function change(feature, scale, times) {
      s.changes = s.changes.filter((c) => c.feature !== feature).concat({ feature, scale, times });
      remember();
      drawChanges();
      steering.scrollIntoView({ block: "nearest" });
    }
    const length = el("input", { type: "number", id: "length", min: 1, max: 200, value: 30, "aria-label": "Tokens to generate" });
    const temperature = el("input", { type: "number", id: "temperature", min: 0, max: 2, step: 0.1, value: 0, "aria-label": "Temperature" });
    function drawChanges() {
      const rows = s.changes.map((c) => {
        const set = (scale, times) => { c.scale = scale; c.times = times; remember(); said.textContent = words(c); };
        const said = el("span", { class: "quiet" }, words(c));
        const slider = el("input", { type: "range", min: -4, max: 8, step: 0.5, value: c.scale === 0 ? 0 : c.times, "aria-label": `Change of feature ${c.feature}`, oninput: (e) => set(1, Number(e.target.value)) });
        return el("li", {}, el("span", {}, link(d, c.feature), s.table ? label(c.feature) : null), slider, said, el("button", { type: "button", class: "plain", onclick: () => { s.changes = s.changes.filter((x) => x !== c); remember(); drawChanges(); } }, "remove"));
      });
      const number_ = el("input", { type: "text", id: "add-feature", placeholder: "feature number", "aria-label": "Feature to change" });
      const add = el("form", { class: "tools", onsubmit: (e) => { e.preventDefault(); const f = Number(number_.value); if (Number.isInteger(f) && f >= 0 && f < SAE.index[d].d_sae && number_.value.trim()) change(f, 1, 1); else { number_.value = ""; number_.placeholder = `0–${SAE.index[d].d_sae - 1}`; } } }, number_, el("button", { type: "submit", class: "plain" }, "Add"));
      steering.replaceChildren(el("h2", {}, "Change features", el("small", {}, "on every token; the strength is in units of the feature's maximum")), el("ul", { class: "changes" }, rows), add,
        el("div", { class: "tools" }, el("button", { type: "button", id: "steer", onclick: steer, disabled: !s.changes.length }, "Generate"), el("label", { class: "check" }, "tokens", length), el("label", { class: "check" }, "temperature", temperature)));
    }
    const words = (c) => (c.scale === 0 ? "ablated" : `${c.times >= 0 ? "+" : "−"}${Math.abs(c.times)} × max`);
    const steer = () => working("Generating", async () => {
      s.text = box.value;
      remember();
      s.table = await SAE.list.table(d);
      const changes = s.changes.map((c) => { const p = SAE.list.placeOf(s.table, c.feature); return { feature: c.feature, scale: c.scale, add: c.scale === 0 ? 0 : c.times * (s.table.max[p] || 1) }; });
      const answer = await SAE.ask("steer", { dictionary: d, text: s.text, changes, tokens: Number(length.value) || 30, temperature: Number(temperature.value) || 0, seed: 0 });
      const most = Math.max(...answer.plain.likeliest.concat(answer.changed.likeliest).map((t) => t.value));
      result.replaceChildren(...[["plain", "The model as it is"], ["changed", "With the features changed"]].map(([name, title]) => el("section", { class: "card", id: `side-${name}` }, el("h2", {}, title),
        el("p", { class: "context" }, el("span", { class: "quiet" }, s.text.slice(-200)), el("b", {}, answer[name].pieces.join(""))),
        el("h3", {}, "Next token"), el("ol", { class: "token-list" }, answer[name].likeliest.map((t) => el("li", { class: "up", css: { "--share": (t.value / most).toFixed(3) } }, chip(t.piece), el("span", { class: "num" }, percent(t.value))))))));
      say("generated");
    });
    drawChanges();
    if (query.has("t")) return run();
  }

  /** "12:0:0 7:1:2" → changes; what is not of this form is left out. */
  const changesOf = (text) => (text || "").split(" ").map((part) => part.split(":").map(Number)).filter((p) => p.length === 3 && p.every(Number.isFinite) && Number.isInteger(p[0]) && p[0] >= 0).map(([feature, scale, times]) => ({ feature, scale, times }));

  SAE.pages.text = page;
})();
