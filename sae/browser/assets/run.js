"use strict";
/* How a run trained: curves, evaluation, events, settings; live while it goes on. */
SAE.run = (() => {
  const { el, load, number, percent, charts } = SAE;
  const EVERY = 3000;
  const CURVES = [["loss", "Loss", true], ["fvu", "FVU: variance left unexplained", true], ["l0", "L0: features active on a token", false], ["dead", "Dead: share of features", false]];

  async function page(main, { dictionary: d }) {
    const about = SAE.index[d], holder = el("div", { class: "charts" }), facts = el("div", {}), state = el("span", { class: "quiet", id: "live" });
    main.replaceChildren(el("div", { class: "page-head" }, el("h1", {}, about.name), state), holder, facts);
    let seen = "";
    const update = (run) => {
      const now = JSON.stringify(run.curves.tokens);
      if (now !== seen) { seen = now; draw(run, holder, facts, about); }
      state.textContent = run.curves.tokens.length ? `${number(run.curves.tokens.at(-1))} tokens in ${time(run.seconds)}` + (SAE.served() ? ", looked at again every 3 s" : "") : "no step is logged yet";
    };
    update(await load(`${d}/run`, SAE.served()));
    if (!SAE.served()) return;
    const timer = setInterval(() => load(`${d}/run`, true).then(update, () => { state.textContent = "the server does not answer"; }), EVERY);
    SAE.leave = () => clearInterval(timer);
  }

  const time = (s) => s === null ? "–" : s < 90 ? `${number(Math.round(s))} s` : s < 5400 ? `${number(Math.round(s / 60))} min` : `${(s / 3600).toFixed(1)} h`;

  function draw(run, holder, facts, about) {
    holder.replaceChildren(...CURVES.map(([name, title, log]) => el("section", { class: "card chart" }, el("h2", {}, title, el("small", {}, last(run.curves[name], name))),
      charts.lines([{ name, points: run.curves.tokens.map((x, i) => [x, run.curves[name][i]]) }], { title: `${title} over tokens`, log }))));
    facts.replaceChildren(evaluation(run.evaluation), events(run.events), settings(run.config));
  }
  const last = (values, name) => { const v = values.at(-1); return v === undefined || v === null ? "" : name === "dead" ? percent(v) : number(v); };

  function evaluation(e) {
    if (!e) return el("section", { class: "card wide" }, el("h2", {}, "Held-out text"), el("p", { class: "quiet" }, "not evaluated yet: ", el("code", {}, "sae evaluate RUN")));
    const est = (x) => !x || x.value === null || x.value === undefined ? "–" : [number(x.value), x.se === null || x.se === undefined ? null : el("small", {}, ` ± ${number(x.se)}`)];
    const ce = e.cross_entropy || {};
    const rows = [["FVU", est(e.fvu)], ["L0", est(e.l0)], ["dead", percent(e.dead && e.dead.value)], ["dense", percent(e.dense && e.dense.value)],
      ["cross-entropy recovered, against the mean", est(ce.recovered_mean)], ["cross-entropy recovered, against zero", est(ce.recovered_zero)], ["cross-entropy, the model alone", est(ce.model)], ["cross-entropy, with the SAE", est(ce.sae)]];
    return el("section", { class: "card wide" }, el("h2", {}, "Held-out text", el("small", {}, `${number(e.n_tokens)} tokens`)), el("table", { class: "facts short" }, el("tbody", {}, rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "num" }, value))))), (e.notes || []).map((n) => el("p", { class: "quiet" }, n)));
  }

  function events(found) {
    if (!found.length) return el("p", { class: "quiet" }, "No batch was skipped, and the run was never resumed.");
    return el("section", { class: "card wide" }, el("h2", {}, "Events"), el("table", { class: "facts" }, el("thead", {}, el("tr", {}, ["tokens", "event", "more"].map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, found.map((e) => {
      const { tokens, seconds, event, ...rest } = e;
      return el("tr", {}, el("td", { class: "num" }, number(tokens)), el("td", {}, String(event)), el("td", {}, Object.keys(rest).length ? el("code", {}, JSON.stringify(rest).slice(0, 200)) : ""));
    }))));
  }
  const settings = (text) => el("details", { class: "provenance" }, el("summary", {}, "Settings"), el("pre", { tabindex: 0 }, text));

  SAE.pages.run = page;
  return { time };
})();
