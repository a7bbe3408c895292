"use strict";
/* Two dictionaries: which features they share, which one splits, and what is in one of them only. */
(() => {
  const { el, load, number, percent, link, charts, address } = SAE;
  const WORDS = { shared: "each other's nearest, cosine from 0.7", split: "the nearest of several of theirs", moved: "something like it is there, cosine from 0.4", lost: "nothing like it, cosine below 0.4" };
  const FEW = 100;

  async function page(main, { dictionary: d, rest, query }) {
    const others = SAE.index.map((a, i) => [i, a]).filter(([i, a]) => i !== d && a.d_sae);
    if (!others.length) {
      main.replaceChildren(el("h1", {}, "Compare"), el("p", {}, "There is one dictionary here. Give two runs to see what they share: "), el("p", {}, el("code", {}, `${SAE.index[d].command} ANOTHER_RUN`)));
      return;
    }
    const other = others.some(([i]) => String(i) === rest[0]) ? Number(rest[0]) : others[0][0];
    const pick = el("select", { id: "other", "aria-label": "Compared with", onchange: () => { location.hash = address(d, `compare/${pick.value}`); } }, others.map(([i, a]) => el("option", { value: i, selected: i === other }, a.name)));
    const head = el("div", { class: "page-head" }, el("h1", {}, "Compare"), el("p", {}, el("b", {}, SAE.index[d].name), " with ", pick));
    main.replaceChildren(head, el("p", { class: "quiet" }, "Matching …"));
    let found;
    try { found = await load(`${d}/compare-${other}`); } catch { main.replaceChildren(head, el("p", {}, "These two write into spaces of different dimensions, so no feature of one has a cosine with one of the other. Compare SAEs of one hookpoint.")); return; }
    const [ours, theirs] = await Promise.all([SAE.list.table(d), SAE.list.table(other)]);
    const live = found.kind.map((_, f) => f).filter((f) => { const p = SAE.list.placeOf(ours, f); return p !== undefined && ours.density[p] > 0; });
    const kinds = found.kinds.map((name, k) => [name, live.filter((f) => found.kind[f] === k)]);
    const cosines = charts.count(live, (f) => found.cosine[f], 0, 1, 40);
    const table = el("div", { id: "matches" });
    let kind = found.kinds.includes(query.get("kind")) ? query.get("kind") : "shared";
    const choose = (name) => { kind = name; SAE.keep(address(d, `compare/${other}`, { kind })); show(); };
    const choices = el("div", { class: "kinds", role: "radiogroup", "aria-label": "Kind" }, kinds.map(([name, own]) => el("label", { class: "card kind" }, el("input", { type: "radio", name: "kind", value: name, checked: name === kind, onchange: () => choose(name) }), el("b", {}, `${number(own.length)} ${name}`), el("span", { class: "quiet" }, percent(own.length / Math.max(1, live.length)), " · ", WORDS[name]))));
    const name = (t, i, f) => { const label = t.labels.get(f); return [link(i, f), label ? el("span", { class: "quiet" }, " " + label.text) : null]; };
    function show() {
      const own = kinds.find(([k]) => k === kind)[1].slice().sort((a, b) => found.cosine[b] - found.cosine[a]);
      const body = el("tbody", {}), heads = ["ours", "theirs", "cosine", "theirs nearest to it", ...(found.overlap ? ["top examples shared"] : [])];
      let drawn = 0;
      const more = el("button", { type: "button", class: "plain", onclick: () => add() });
      const add = () => {
        own.slice(drawn, drawn + FEW).forEach((f) => body.append(el("tr", {}, el("td", {}, name(ours, d, f)), el("td", {}, name(theirs, other, found.nearest[f])), el("td", { class: "num" }, number(found.cosine[f])), el("td", { class: "num" }, number(found.children[f])), found.overlap ? el("td", { class: "num" }, percent(found.overlap[f])) : null)));
        drawn = Math.min(own.length, drawn + FEW);
        more.hidden = drawn >= own.length;
        more.textContent = `Show more (${number(own.length - drawn)} left)`;
      };
      table.replaceChildren(el("table", { class: "facts" }, el("thead", {}, el("tr", {}, heads.map((h, i) => el("th", { scope: "col", class: i > 1 ? "num" : null }, h)))), body), more);
      add();
    }
    main.replaceChildren(...[head, choices, el("section", { class: "card wide" }, el("h2", {}, "Cosine to the nearest", el("small", {}, `of ${number(live.length)} features that fire`)), charts.bars(cosines.counts, cosines.edges, { title: "Features by cosine to the nearest of the other dictionary" })), found.overlap ? null : el("p", { class: "quiet" }, "They have read different text, so how often they fire together is not known.") , table].filter(Boolean));
    show();
  }
  SAE.pages.compare = page;
})();
