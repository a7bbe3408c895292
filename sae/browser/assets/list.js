"use strict";
/* The list of all features: search, sort, filter by ranges drawn or typed, and take the result away.

   All numbers are typed arrays, sorted by radix, and only the lines in sight are in the page, so a
   million features are as quick as a thousand. */
SAE.list = (() => {
  const { el, load, numbers, percent, number, chip, visible, address, keep, link, say, charts } = SAE;
  const LINE = 58, TALLEST = 8e6, PAUSE = 120, DENSE = 0.1, RARE = 1e-5;
  const SORTS = { feature: "number", density: "density", max: "strongest", participation: "neurons" };
  const RANGES = ["density", "max", "participation"];
  const known = new Map();

  /** The columns of a dictionary with what is derived of them, once. */
  async function table(d) {
    if (known.has(d)) return known.get(d);
    const [raw, given] = await Promise.all([load(`${d}/columns`), load(`${d}/labels`)]);
    const made = { n: raw.n, ids: raw.features ? numbers(raw.features, Int32Array) : null, orders: new Map() };
    for (const name of ["density", "max", "participation"]) made[name] = numbers(raw[name]);
    SAE.forget(`${d}/columns`);
    made.place = made.ids ? new Map(Array.from(made.ids, (f, i) => [f, i])) : null;
    made.labels = new Map(given.labels.map(([f, text, machine]) => [f, { text, machine }]));
    made.editable = given.editable;
    known.set(d, made);
    return made;
  }
  const idOf = (t, i) => (t.ids ? t.ids[i] : i);
  const placeOf = (t, f) => (t.ids ? t.place.get(f) : f < t.n ? f : undefined);

  /** All places by a column, ascending, NaN last: a radix sort of three passes over 11 bits. */
  function sorted(t, name) {
    if (t.orders.has(name)) return t.orders.get(name);
    const n = t.n;
    let from = new Uint32Array(n), to = new Uint32Array(n);
    for (let i = 0; i < n; i++) from[i] = i;
    if (name !== "feature") {
      const column = t[name], keys = new Uint32Array(column.buffer.slice(0));
      for (let i = 0; i < n; i++) {
        const bits = keys[i];
        keys[i] = column[i] !== column[i] ? 0xffffffff : bits & 0x80000000 ? ~bits : bits | 0x80000000;
      }
      for (let shift = 0; shift < 33; shift += 11) {
        const counts = new Uint32Array(2049);
        for (let i = 0; i < n; i++) counts[((keys[i] >>> shift) & 2047) + 1]++;
        for (let b = 0; b < 2048; b++) counts[b + 1] += counts[b];
        for (let i = 0; i < n; i++) { const at = from[i]; to[counts[(keys[at] >>> shift) & 2047]++] = at; }
        [from, to] = [to, from];
      }
    }
    t.orders.set(name, from);
    return from;
  }

  /** The places that pass all filters, in the order asked for. */
  function chosen(t, s) {
    const order = sorted(t, s.sort), n = t.n, found = new Uint32Array(n);
    const ranges = RANGES.filter((r) => s[r]).map((r) => [t[r], ...s[r]]);
    let count = 0;
    const take = (i) => {
      if (s.show === "live" && t.density[i] === 0) return;
      if (s.show === "dead" && t.density[i] !== 0) return;
      if (s.show === "dense" && !(t.density[i] > DENSE)) return;
      if (s.show === "labelled" && !t.labels.has(idOf(t, i))) return;
      for (const [column, low, high] of ranges) if (!(column[i] >= low && column[i] <= high)) return;
      if (s.found && !s.found.has(idOf(t, i))) return;
      found[count++] = i;
    };
    if (s.down && s.sort !== "feature") {
      // Those that have no number stay last.
      let end = n;
      while (end > 0 && Number.isNaN(t[s.sort][order[end - 1]])) end--;
      for (let k = end - 1; k >= 0; k--) take(order[k]);
      for (let k = end; k < n; k++) take(order[k]);
    } else if (s.down) for (let k = n - 1; k >= 0; k--) take(order[k]);
    else for (let k = 0; k < n; k++) take(order[k]);
    return found.subarray(0, count);
  }

  /** The features whose label or tokens hold the text; null for no text. */
  async function search(d, t, text, inside, signal) {
    const wanted = text.toLowerCase().trim();
    if (!wanted) return null;
    const found = new Set();
    for (const [feature, label] of t.labels) if (label.text.toLowerCase().includes(wanted)) found.add(feature);
    if (SAE.served()) {
      const answer = await SAE.ask("search", { dictionary: d, text: wanted, examples: inside }, signal);
      for (const feature of answer.features) found.add(feature);
      return found;
    }
    const { texts, limit } = await load(`${d}/search`);
    if (!texts) throw new Error(`more than ${number(limit)} features are searched by the server only: ${SAE.index[d].command}`);
    texts.forEach((own, i) => { if (own.toLowerCase().includes(wanted)) found.add(idOf(t, i)); });
    return found;
  }

  /* ---------------------------------------------------------------------------------- state */

  function read(query) {
    const range = (text) => {
      const pair = (text || "").split("~").map(Number);
      return pair.length === 2 && pair.every(Number.isFinite) ? pair : null;
    };
    const s = { sort: query.get("sort") in SORTS ? query.get("sort") : "max", down: query.get("up") !== "1",
      show: query.get("show") || "live", q: query.get("q") || "", inside: query.get("in") === "examples", found: null };
    for (const name of RANGES) s[name] = range(query.get(name));
    return s;
  }
  const write = (d, s) => address(d, "features", { sort: s.sort === "max" ? "" : s.sort, up: s.down ? "" : "1",
    show: s.show === "live" ? "" : s.show, q: s.q, in: s.inside && s.q ? "examples" : "",
    ...Object.fromEntries(RANGES.map((r) => [r, s[r] ? s[r].map((x) => Number(x.toPrecision(6))).join("~") : ""])) });

  /* --------------------------------------------------------------------------------- drawing */

  /** A text as it stands in a line of the list: runs of spaces are one. */
  const oneLine = (text) => visible(text).replace(/ {2,}/g, " ");

  function line(d, t, i, rank, q) {
    const feature = idOf(t, i), label = t.labels.get(feature);
    const text = el("span", { class: "sample" }), tokens = el("span", { class: "tokens" });
    const row = el("div", { class: "row", role: "row", "aria-rowindex": rank + 2 },
      el("span", { role: "cell", class: "id" }, link(d, feature)),
      el("span", { role: "cell", class: "what" },
        label ? el("span", { class: "label-text" + (label.machine ? " machine" : ""), title: label.machine ? "made by a machine" : null }, label.text) : null,
        text, tokens),
      el("span", { role: "cell", class: "num" }, percent(t.density[i])),
      el("span", { role: "cell", class: "num" }, number(t.max[i])),
      el("span", { role: "cell", class: "num wide" }, number(t.participation[i])));
    const size = SAE.index[d].parts.rows;
    row.filled = load(`${d}/rows-${Math.floor(feature / size)}`).then((rows) => {
      const own = rows.find((r) => r[0] === feature);
      if (!own) return;
      if (own[3]) {
        const [before, token, after] = own[3];
        text.append(el("span", { class: "before" }, el("bdi", {}, oneLine(before))), el("mark", {}, visible(token)), el("bdi", {}, oneLine(after)));
      } else text.append(el("em", {}, "never fires on the scanned text"));
      const wanted = q.toLowerCase().trim(), hit = (p) => (wanted && p.toLowerCase().includes(wanted) ? "hit" : "");
      if (label) return; // a row has room for two lines
      for (const [name, pieces] of [["fires on ", own[1]], ["promotes ", own[2]]]) {
        if (pieces.length) tokens.append(el("span", { class: "quiet" }, name), ...pieces.map((p) => chip(p, hit(p))));
      }
    }).catch(() => text.append(el("em", {}, "this part of the pages cannot be loaded")));
    return row;
  }

  /** Keeps the lines in sight in the page, whatever the number of all. */
  function virtual(scroller, draw) {
    const space = el("div", { class: "space", role: "none" }), drawn = new Map();
    scroller.append(space);
    let places = new Uint32Array(0), from = 0;
    const visibleLines = () => Math.ceil(scroller.clientHeight / LINE) + 1;
    const tall = () => Math.min(places.length * LINE, TALLEST);
    function refresh() {
      const n = places.length, full = n * LINE, view = scroller.clientHeight;
      const share = tall() > view ? scroller.scrollTop / (tall() - view) : 0;
      const offset = full > TALLEST ? share * (full - view) : scroller.scrollTop;
      from = Math.max(0, Math.floor(offset / LINE) - 3);
      const to = Math.min(n, from + visibleLines() + 6);
      for (const [rank, row] of drawn) if (rank < from || rank >= to) { row.remove(); drawn.delete(rank); }
      for (let rank = from; rank < to; rank++) {
        let row = drawn.get(rank);
        if (!row) {
          row = draw(places[rank], rank);
          drawn.set(rank, row);
          space.append(row);
        }
        row.style.transform = `translateY(${rank * LINE - offset + scroller.scrollTop}px)`;
      }
    }
    let asked = 0;
    scroller.addEventListener("scroll", () => { if (!asked) asked = requestAnimationFrame(() => { asked = 0; refresh(); }); });
    new ResizeObserver(refresh).observe(scroller);
    return {
      set(found) {
        places = found;
        for (const row of drawn.values()) row.remove();
        drawn.clear();
        space.style.height = `${tall()}px`;
        scroller.scrollTop = 0;
        refresh();
      },
      refresh,
      filled: () => Promise.all(Array.from(drawn.values(), (row) => row.filled)),
    };
  }

  const COLUMNS = [["feature", "Feature", "id"], [null, "Strongest example, and its tokens", "what"], ["density", "Density", "num"], ["max", "Max", "num"], ["participation", "Neurons", "num wide"]];
  const MEANS = { density: "share of the tokens on which it fires", max: "its strongest activation", participation: "effective number of neurons it writes to" };

  /** The whole page. */
  async function page(main, { dictionary: d, query }) {
    const t = await table(d), s = read(query), about = SAE.index[d];
    const count = el("p", { class: "quiet", id: "count", role: "status" });
    const box = el("input", { type: "search", id: "search", value: s.q, placeholder: "Search labels and tokens", "aria-label": "Search", autocomplete: "off", spellcheck: "false" });
    const inside = el("input", { type: "checkbox", checked: s.inside, disabled: !SAE.served() });
    const show = el("select", { id: "show", "aria-label": "Which features" }, Object.entries({ live: "that fire", all: "all", dead: "dead", dense: "dense (over 10 %)", labelled: "labelled" }).map(([value, text]) => el("option", { value, selected: s.show === value }, text)));
    const heads = el("div", { role: "row", class: "row head", "aria-rowindex": 1 });
    const scroller = el("div", { class: "scroller", id: "rows", tabindex: 0, role: "rowgroup", "aria-label": "Features" });
    const plots = el("section", { class: "plots", "aria-label": "Select by numbers" });
    const grid = el("div", { role: "table", class: "list", "aria-label": "Features", "aria-rowcount": t.n }, el("div", { role: "rowgroup" }, heads), scroller);
    main.replaceChildren(
      el("div", { class: "page-head" }, el("h1", {}, about.hookpoint || about.name), el("p", { class: "quiet" }, `${number(about.shown)} features of ${about.model || "a model"}, over ${number(about.tokens)} tokens`)),
      el("div", { class: "tools" }, box,
        el("label", { class: "check", title: SAE.served() ? null : "needs the server" }, inside, SAE.served() ? "in examples too" : ["in examples: ", el("code", {}, about.command)]),
        el("label", { class: "check" }, "Show", show), takeAway(d, t, s, () => places)),
      plots, count, grid);
    const lines = virtual(scroller, (i, rank) => line(d, t, i, rank, s.q));
    let places = new Uint32Array(0), asking = null;

    function drawHeads() {
      heads.replaceChildren(...COLUMNS.map(([name, text, cls]) => el("span", { role: "columnheader", class: cls, "aria-sort": name === s.sort ? (s.down ? "descending" : "ascending") : null },
        name ? el("button", { type: "button", class: "sort", title: MEANS[name] || null, onclick: () => { if (s.sort === name) s.down = !s.down; else { s.sort = name; s.down = name !== "feature"; } update(); } }, text, el("span", { "aria-hidden": "true" }, name === s.sort ? (s.down ? " ↓" : " ↑") : "")) : text)));
    }
    function update() {
      drawHeads();
      places = chosen(t, s);
      lines.set(places);
      count.textContent = places.length === t.n ? `All ${number(t.n)} features` : `${number(places.length)} of ${number(t.n)} features` + (s.found ? ` · “${s.q}”` : "");
      grid.setAttribute("aria-rowcount", places.length + 1);
      keep(write(d, s));
      main.dispatchEvent(new CustomEvent("listed"));
    }
    async function find() {
      if (asking) asking.abort();
      asking = new AbortController();
      const mine = asking;
      count.textContent = s.q ? "Searching …" : "";
      try {
        const found = await search(d, t, s.q, s.inside, mine.signal);
        if (mine.signal.aborted) return;
        s.found = found;
        update();
      } catch (error) { if (error.name !== "AbortError") count.textContent = error.message; }
    }
    let pause = 0;
    box.addEventListener("input", () => { s.q = box.value; clearTimeout(pause); pause = setTimeout(find, PAUSE); });
    inside.addEventListener("change", () => { s.inside = inside.checked; if (s.q) find(); });
    show.addEventListener("change", () => { s.show = show.value; update(); });
    scroller.addEventListener("keydown", (event) => move(event, scroller));
    if (s.q) await find(); else update();
    SAE.state.list = { d, around: (feature) => around(t, places, feature) };
    await lines.filled();
    await new Promise(requestAnimationFrame); // the list is there first
    SAE.ranges.draw(plots, t, s, update);
  }

  /** The features before and after one in the order of the list; null where it is not in it. */
  function around(t, places, feature) {
    const at = places.indexOf(placeOf(t, feature)), n = places.length;
    return at < 0 ? null : { previous: idOf(t, places[(at - 1 + n) % n]), next: idOf(t, places[(at + 1) % n]) };
  }

  /** Arrow keys go from line to line. */
  function move(event, scroller) {
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (!step) return;
    const links = [...scroller.querySelectorAll(".id a")].sort((a, b) => a.closest(".row").getAttribute("aria-rowindex") - b.closest(".row").getAttribute("aria-rowindex"));
    const at = links.indexOf(document.activeElement);
    const next = at < 0 ? links.find((a) => a.getBoundingClientRect().top >= scroller.getBoundingClientRect().top) : links[at + step];
    if (next) { event.preventDefault(); next.focus(); next.closest(".row").scrollIntoView({ block: "nearest" }); }
  }

  /** The selection as a file. */
  function takeAway(d, t, s, places) {
    const more = {};
    async function fetchMore() {
      const raw = await load(`${d}/more`);
      for (const name of ["mean", "n_fired"]) more[name] = numbers(raw[name]);
      SAE.forget(`${d}/more`);
    }
    const rows = () => Array.from(places(), (i) => ({ feature: idOf(t, i), density: value(t.density[i]), max: value(t.max[i]), mean: value(more.mean[i]), n_fired: more.n_fired[i], participation: value(t.participation[i]), label: (t.labels.get(idOf(t, i)) || { text: null }).text }));
    const value = (x) => (Number.isNaN(x) ? null : Number(x.toPrecision(8)));
    const csv = (found) => [Object.keys(found[0] || { feature: 0 }), ...found.map(Object.values)].map((cells) => cells.map(cell).join(",")).join("\n") + "\n";
    const kinds = {
      CSV: () => SAE.save("features.csv", "text/csv", csv(rows())),
      JSON: () => SAE.save("features.json", "application/json", JSON.stringify(rows(), null, 1)),
      Parquet: async () => {
        const answer = await SAE.ask("export", { dictionary: d, features: rows().map((r) => r.feature) });
        SAE.save("features.parquet", "application/octet-stream", new Uint8Array(numbers(answer.parquet, Uint8Array)));
      },
    };
    const button = (name) => el("button", { type: "button", class: "plain", disabled: name === "Parquet" && !SAE.served(), title: name === "Parquet" && !SAE.served() ? `needs the server: ${SAE.index[d].command}` : null, onclick: () => (more.mean ? Promise.resolve() : fetchMore()).then(kinds[name]).then(() => say(`${name} saved`), (e) => say(e.message)) }, name);
    return el("span", { class: "take" }, "Save", Object.keys(kinds).map(button));
  }

  /** A cell of CSV; text that a spreadsheet would take for a formula is set apart. */
  function cell(x) {
    if (x === null) return "";
    if (typeof x !== "string") return String(x);
    const safe = /^[=+\-@\t\r]/.test(x) ? "'" + x : x;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  }

  /** Put a new label into what the list knows. */
  function relabel(d, feature, label) {
    const t = known.get(d);
    if (!t) return;
    if (label) t.labels.set(feature, label); else t.labels.delete(feature);
  }

  SAE.pages.features = page;
  return { table, sorted, idOf, placeOf, relabel, DENSE, RARE };
})();
