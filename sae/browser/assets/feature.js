"use strict";
/* One feature: its numbers, what it reads and writes, its neurons and neighbours, and its examples. */
SAE.feature = (() => {
  const { el, load, percent, number, signed, chip, visible, link, shade, explain, charts, keep, say, address } = SAE;
  const WIDTHS = [["5", "Short", 5], ["16", "Medium", 16], ["full", "Full", Infinity]];
  const FEW = 5;

  /** The stored page of a feature, and the tokens its examples refer to. */
  async function fetchPage(d, feature) {
    const size = SAE.index[d].parts.features;
    const part = await load(`${d}/features-${Math.floor(feature / size)}`);
    const own = part.pages[feature];
    if (!own) throw new Error(`feature ${feature} is not among these pages`);
    return { own, tokens: part.tokens };
  }

  async function page(main, { dictionary: d, rest, query }) {
    const feature = Number(rest[0]), about = SAE.index[d];
    if (!/^\d{1,9}$/.test(rest[0] || "") || feature >= about.d_sae) throw new Error(`feature ${(rest[0] || "").slice(0, 40)}: this SAE has features 0–${about.d_sae - 1}`);
    const [t, { own, tokens }] = await Promise.all([SAE.list.table(d), fetchPage(d, feature)]);
    const view = { width: query.get("width") || "16", lines: query.get("lines") === "1" };
    main.replaceChildren(
      head(d, t, feature, own),
      el("div", { class: "cards" },
        card("Activations", histogram(own)), card("Logits", logits(own)),
        card("Promotes", tokenTable(own.writes, "up"), "raises the logits of"), card("Suppresses", tokenTable(own.suppresses, "down"), "lowers the logits of"),
        card("Reads", tokenTable(own.reads, "read"), "embeddings that excite it"), card("Fires on", firesOn(own), "share of its activation"),
        card("Neurons", neurons(own)), card("Correlated neurons", correlated(own), "Pearson's r"),
        card("Nearest", others(d, t, own.neighbours), "decoder cosine"), card("Fires together", others(d, t, own.cofiring), "correlation of firing")),
      examples(d, own, tokens, view, feature),
      provenance(about));
    document.title = `Feature ${feature}`;
  }

  /* ---------------------------------------------------------------------------------- head */

  function head(d, t, feature, own) {
    const around = neighbours(d, t, feature), go = (f) => SAE.featureAddress(d, f);
    const copy = el("button", { type: "button", class: "plain", onclick: async () => {
      try { await navigator.clipboard.writeText(location.href); copy.textContent = "Copied"; } catch { copy.textContent = location.href; }
      say("address copied");
    } }, "Copy link");
    return el("header", { class: "page-head feature-head" },
      el("div", { class: "between" },
        el("h1", {}, "Feature ", el("span", { class: "id" }, feature), ...badges(own)),
        el("nav", { class: "steps", "aria-label": "Other features" },
          el("a", { href: go(around.previous), id: "previous", title: "Key: ←" }, "← Previous"), el("a", { href: go(around.next), id: "next", title: "Key: →" }, "Next →"),
          el("a", { href: go(around.random), id: "random", title: "Key: r" }, "Random"), copy)),
      label(d, t, feature),
      el("dl", { class: "stats" }, [
        ["density", percent(own.density)], ["log₁₀ density", own.density > 0 ? Math.log10(own.density).toFixed(2) : "–"],
        ["fires on", `${number(own.n_fired)} tokens`], ["max", number(own.max)], ["mean when firing", number(own.mean)],
        ["neurons, effective", number(own.participation)],
      ].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
  }

  function badges(own) {
    const found = [];
    if (own.n_fired === 0) found.push(["dead", "never fires on the scanned text"]);
    else if (own.density < SAE.list.RARE) found.push(["rare", "fires on less than one token in 100,000"]);
    if (own.density > SAE.list.DENSE) found.push(["dense", "fires on more than 10 % of tokens"]);
    return found.map(([name, why]) => el("span", { class: `badge ${name}`, title: why }, name));
  }

  /** The features before and after in the order of the list, if one was seen, else by number. */
  function neighbours(d, t, feature) {
    const seen = SAE.state.list && SAE.state.list.d === d ? SAE.state.list.around(feature) : null;
    const place = SAE.list.placeOf(t, feature), id = (i) => SAE.list.idOf(t, (i + t.n) % t.n);
    let random = feature;
    for (let tries = 0; tries < 200; tries++) {
      const i = Math.floor(Math.random() * t.n);
      if (t.density[i] > 0 && id(i) !== feature) { random = id(i); break; }
    }
    if (seen) return { ...seen, random };
    return { previous: id(place - 1), next: id(place + 1), random };
  }

  function label(d, t, feature) {
    const holder = el("div", { class: "label-line" });
    const show = () => {
      const label = t.labels.get(feature);
      const text = label ? el("span", { class: "label-text", id: "label" }, label.text) : el("span", { class: "quiet", id: "label" }, "no label yet");
      const mark = label && label.machine ? el("span", { class: "badge machine" }, "machine-made") : null;
      const edit = SAE.served() && t.editable ? el("button", { type: "button", class: "plain", id: "edit-label", title: "Key: l", onclick: ask }, label ? "Edit" : "Add a label")
        : el("span", { class: "quiet" }, "to edit: ", el("code", {}, SAE.index[d].command));
      holder.replaceChildren(text, ...(mark ? [mark] : []), edit);
    };
    const ask = () => {
      const label = t.labels.get(feature);
      const box = el("input", { type: "text", id: "label-box", maxlength: 400, value: label ? label.text : "", "aria-label": "Label" });
      const wrong = el("span", { class: "wrong", role: "alert" });
      const form = el("form", { onsubmit: async (event) => {
        event.preventDefault();
        try {
          const text = box.value.trim();
          const answer = await SAE.ask("label", { dictionary: d, feature, text });
          SAE.list.relabel(d, feature, answer.text ? { text: answer.text, machine: false } : null);
          show();
          say("label saved");
        } catch (error) { wrong.textContent = error.message; }
      } }, box, el("button", { type: "submit" }, "Save"), el("button", { type: "button", class: "plain", onclick: show }, "Cancel"), wrong);
      box.addEventListener("keydown", (event) => { if (event.key === "Escape") show(); });
      holder.replaceChildren(form);
      box.focus();
    };
    show();
    return holder;
  }

  /* ---------------------------------------------------------------------------------- cards */

  function card(title, content, note) {
    return el("section", { class: "card" }, el("h2", {}, title, note ? el("small", {}, note) : null), content || el("p", { class: "quiet" }, "not there for this model or hookpoint"));
  }
  function histogram(own) {
    if (!own.histogram) return el("p", { class: "quiet" }, "never fires on the scanned text");
    const { counts, edges } = own.histogram;
    return charts.bars(counts, edges, { title: `Histogram of ${number(own.n_fired)} activations from 0 to ${number(own.max)}, log counts`, log: true, look: (i) => [[`${number(edges[i])} to ${number(edges[i + 1])}`, `${number(counts[i])} tokens`]] });
  }
  function logits(own) {
    if (!own.logit_histogram) return null;
    const { counts, edges } = own.logit_histogram;
    return charts.bars(counts, edges, { title: `Histogram of what it adds to the logits of the vocabulary, ${number(edges[0])} to ${number(edges[edges.length - 1])}, log counts`, log: true, tone: (i) => (edges[i] + edges[i + 1] < 0 ? "down" : "up"), look: (i) => [[`${signed(edges[i])} to ${signed(edges[i + 1])}`, `${number(counts[i])} tokens of the vocabulary`]] });
  }
  function tokenTable(items, tone) {
    if (!items || !items.length) return null;
    const most = Math.max(...items.map((i) => Math.abs(i[2])));
    return el("ol", { class: "token-list" }, items.map(([id, piece, value]) =>
      bar(chip(piece), signed(value), Math.abs(value) / most, tone, () => [["token", visible(piece).slice(0, 200)], ["id", String(id)], ["value", signed(value)]])));
  }
  function bar(name, value, share, tone, lines) {
    const item = el("li", { css: { "--share": share.toFixed(3) }, class: tone, tabindex: 0 }, name, el("span", { class: "num" }, value));
    return explain(item, lines);
  }
  function firesOn(own) {
    if (!own.top_tokens || !own.top_tokens.length) return el("p", { class: "quiet" }, "nothing");
    const most = own.top_tokens[0][2];
    return el("ol", { class: "token-list" }, own.top_tokens.map(([id, piece, value]) =>
      bar(chip(piece), percent(value), value / most, "read", () => [["token", visible(piece).slice(0, 200)], ["id", String(id)], ["share", percent(value)]])));
  }

  /** The neurons it is made of, as a row of bars from the largest, and how many count. */
  function neurons(own) {
    if (!own.neurons || !own.neurons.length) return null;
    const most = Math.max(...own.neurons.map((n) => Math.abs(n[1])));
    return el("div", {},
      own.participation === null ? null : el("p", { class: "lead" }, el("b", {}, number(own.participation)), own.participation < 2 ? " neurons: almost one alone" : " neurons at once: its superposition"),
      el("ol", { class: "token-list" }, own.neurons.map(([neuron, weight]) =>
        bar(el("span", { class: "quiet" }, `neuron ${neuron}`), signed(weight), Math.abs(weight) / most, weight > 0 ? "up" : "down", () => [["neuron", String(neuron)], ["decoder weight", signed(weight)]]))));
  }
  function correlated(own) {
    if (!own.correlated_neurons) return null;
    if (!own.correlated_neurons.length) return el("p", { class: "quiet" }, "it fires too rarely to tell");
    return el("ol", { class: "token-list" }, own.correlated_neurons.map(([neuron, r]) =>
      bar(el("span", { class: "quiet" }, `neuron ${neuron}`), signed(r), Math.abs(r), r > 0 ? "up" : "down", () => [["neuron", String(neuron)], ["Pearson's r", signed(r)]])));
  }

  /** Other features, with their labels. */
  function others(d, t, items) {
    if (!items) return null;
    if (!items.length) return el("p", { class: "quiet" }, "none");
    return el("ol", { class: "token-list" }, items.map(([f, value]) => {
      const label = t.labels.get(f);
      return bar(el("span", {}, link(d, f), label ? el("span", { class: "quiet" }, " " + label.text) : null), signed(value), Math.min(1, Math.abs(value)), "read", () => [["feature", String(f)], ...(label ? [["label", label.text]] : []), ["value", signed(value)]]);
    }));
  }

  /* ------------------------------------------------------------------------------- examples */

  function examples(d, own, tokens, view, feature) {
    const holder = el("div", { id: "examples" });
    const section = el("section", { class: "examples", "aria-label": "Examples" });
    const draw = () => {
      holder.className = view.lines ? "with-lines" : "";
      holder.replaceChildren(...groups(own).map((group) => block(d, own, tokens, view, group)));
      keep(address(d, `feature/${feature}`, { width: view.width === "16" ? "" : view.width, lines: view.lines ? "1" : "" }));
    };
    const widths = el("span", { class: "choice", role: "radiogroup", "aria-label": "Context" }, WIDTHS.map(([value, text]) =>
      el("label", {}, el("input", { type: "radio", name: "width", value, checked: view.width === value, onchange: () => { view.width = value; draw(); } }), text)));
    const lines = el("label", { class: "check" }, el("input", { type: "checkbox", id: "lines", checked: view.lines, onchange: (e) => { view.lines = e.target.checked; draw(); } }), "line breaks");
    section.append(el("div", { class: "between" }, el("h2", {}, "Examples"), el("span", { class: "tools" }, widths, lines)), holder);
    if (!own.examples.length) { holder.append(el("p", { class: "quiet" }, "It never fires on the scanned text, so there is nothing to show.")); return section; }
    draw();
    return section;
  }

  function groups(own) {
    const of = (kind) => own.examples.filter((e) => e.kind === kind).sort((a, b) => a.rank - b.rank);
    const intervals = own.intervals.map(([low, high, count]) => ({
      title: `Interval ${number(low)}–${number(high)}`, note: `holds ${percent(count / Math.max(1, own.n_fired))} of its activations`,
      items: of("interval").filter((e) => Math.abs(e.high - high) < 1e-3 * own.max).sort((a, b) => b.peak - a.peak) }));
    return [{ title: "Strongest", note: "one a sequence, duplicates folded", items: of("top") }, ...intervals,
      { title: "Random", note: "of all tokens it fires on", items: of("random") }].filter((g) => g.items.length);
  }

  function block(d, own, tokens, view, group) {
    const list = el("div", { class: "contexts" }), rest = group.items.slice(FEW);
    group.items.slice(0, FEW).forEach((e) => list.append(example(d, own, tokens, view, e)));
    const more = rest.length ? el("button", { type: "button", class: "plain more", onclick: (event) => { rest.forEach((e) => list.append(example(d, own, tokens, view, e))); event.target.remove(); } }, `Show ${rest.length} more`) : null;
    return el("section", { class: "group" }, el("h3", {}, group.title, el("small", {}, group.note)), list, more);
  }

  function example(d, own, tokens, view, e) {
    const text = el("div", { class: "context", dir: "auto" });
    const n = e.duplicates;
    const row = el("div", { class: "example" }, el("span", { class: "peak num" }, number(e.peak)), text,
      n ? el("span", { class: "quiet alike" }, `+ ${number(n)} alike`) : null);
    const width = WIDTHS.find(([value]) => value === view.width) || WIDTHS[1];
    if (width[2] === Infinity) {
      text.append(el("span", { class: "quiet" }, "Loading …"));
      const size = SAE.index[d].parts.text;
      load(`${d}/text-${Math.floor(e.row / size)}`).then((rows) => {
        const [ids, pieces] = rows[e.row % size];
        fill(text, own, e, view, 0, ids.map((id, i) => [id, pieces[i]]));
      }, () => { text.textContent = "this text cannot be loaded"; });
    } else {
      const at = e.column - e.start, from = Math.max(0, at - width[2]);
      fill(text, own, e, view, e.start + from, e.tokens.slice(from, at + width[2] + 1).map((i) => tokens[i]));
    }
    return row;
  }

  /** The tokens of a context; a token's page column is `first` plus its place. */
  function fill(holder, own, e, view, first, pairs) {
    const acts = new Map(e.indices.map((column, i) => [column, e.values[i]]));
    holder.replaceChildren(...pairs.flatMap(([id, piece], i) => {
      const column = first + i, act = acts.get(column) || 0, marked = column === e.column;
      return token(id, piece, act, own.max, view.lines, marked, () => [["token", visible(piece).slice(0, 200)], ["id", String(id)], ["activation", act ? number(act) : "0"], ["position", `${number(e.position + column - e.column)} of document ${number(e.document)}`]]);
    }));
  }

  /** A token of running text, with a line break behind it where it holds one. */
  function token(id, piece, act, max, breaks, marked, lines) {
    const shown = breaks ? piece.replace(/\t/g, "    ").replace(/\n/g, "↵") : visible(piece).replace(/^␣+$/, (s) => " ".repeat(s.length));
    const made = el("span", { class: "token" + (marked ? " marked" : "") }, breaks ? visible(shown).replace(/^␣+$/, (s) => " ".repeat(s.length)) : shown);
    shade(made, act / max);
    explain(made, lines);
    return breaks && piece.includes("\n") ? [made, el("br")] : [made];
  }

  function provenance(about) {
    const facts = { model: about.model, revision: about.revision, hookpoint: about.hookpoint, data: about.data, "data fingerprint": about.data_fingerprint, "tokens scanned": number(about.tokens), context: about.context && `${about.context} tokens`, "SAE SHA-256": about.sae_sha256, sae: about.versions && about.versions.sae };
    return el("details", { class: "provenance" }, el("summary", {}, "Where this comes from"), el("dl", {}, Object.entries(facts).filter(([, v]) => v).map(([k, v]) => [el("dt", {}, k), el("dd", {}, String(v))])));
  }

  SAE.pages.feature = page;
  return { fetchPage, token, card };
})();
