"use strict";
// Draws figures and tables when the part that holds them is opened, and follows the light or dark colour scheme.
(async () => {
  const root = document.documentElement;
  async function unpacked(name) {  // JSON, compressed by gzip, in base64
    const bytes = Uint8Array.from(atob(document.getElementById(name).textContent), c => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const state = { drawn: 0, tables: 0 };
  const tell = () => { root.dataset.drawn = state.drawn; root.dataset.tables = state.tables; root.dataset.errors = failures.length; };

  // --- figures: one specification for both colour schemes; in a closed part they are drawn once it is opened
  const { themes, specs, panels } = await unpacked("figures");
  const views = new Map();
  async function draw(place) {
    const { spec, keys, rows } = panels[place.id.replace("figure-", "")];
    const values = rows.map(row => Object.fromEntries(keys.map((key, i) => [key, row[i]]).filter(([, value]) => value !== null)));
    views.get(place)?.finalize();
    const config = themes[dark.matches ? "dark" : "light"];
    const whole = { ...specs[spec], datasets: { records: values } };
    const view = await vegaEmbed(place, whole, { actions: false, renderer: "svg", config, tooltip: { theme: "custom" } });
    if (!views.has(place)) state.drawn += 1;
    views.set(place, view);
    tell();
  }
  const isOpen = place => !place.closest("details:not([open])");
  async function drawOpen() {  // one after the other, so that the page answers in between
    for (const place of document.querySelectorAll(".figure"))
      if (!views.has(place) && isOpen(place)) await draw(place);
    root.dataset.figuresDrawn = state.drawn;
  }
  for (const part of document.querySelectorAll("details"))
    part.addEventListener("toggle", () => { if (part.open) { drawOpen(); makeTables(); } });

  // --- tables
  const minus = text => text.replace("-", "\u2212");
  const percent = value => (100 * value).toFixed(1);
  const points = value => { const text = (100 * value).toFixed(1); return Number(text) === 0 ? "0.0" : minus(value > 0 ? "+" + text : text); };
  const count = value => String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
  function duration(seconds) {
    const [hours, minutes] = [Math.floor(Math.round(seconds) / 3600), Math.floor(Math.round(seconds) % 3600 / 60)];
    if (seconds < 59.5) return `${seconds < 9.95 ? seconds.toFixed(1) : seconds.toFixed(0)} s`;
    return hours ? `${hours} h ${minutes} min` : `${minutes} min ${Math.round(seconds) % 60} s`;
  }
  const setting = value => value === 0 || (value >= 1e-4 && value < 1e6) ? String(Number(value.toPrecision(4))) : value.toExponential().replace(/e([+-])(\d)$/, "e$10$2");
  const shown = { percent, points, count, duration, setting };
  const escaped = text => String(text).replace(/[&<>"]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const tables = await unpacked("tables"), made = new Map();

  function column({ title, kind, words, hidden }, i) {
    const text = words !== undefined;
    // DataTables reads every text as HTML, that of its filters too, so all kinds are escaped.
    const value = cell => text ? escaped(words[cell]) : Array.isArray(cell) ? cell[0] : cell === "baseline" ? 0 : cell;
    const say = cell => {
      if (cell === null) return "\u2013";
      if (text) return escaped(words[cell]);
      if (cell === "baseline") return cell;
      if (Array.isArray(cell)) return shown[kind](cell[0]) + (cell[1] === null ? "" : ` \u00b1 ${percent(cell[1])}`) + (cell[2] ? " " + cell[2] : "");
      return shown[kind](cell);
    };
    return {
      visible: !hidden,
      className: text ? (kind === "code" ? "probe" : "") : i && ["percent", "points"].includes(kind) && title !== "Val., %" && title !== "Train, %" ? "strong" : "",
      type: text ? "string" : "num",
      // What is absent goes last, whichever way it is sorted.
      render: (cell, type) => type === "display" ? say(cell) : cell === null ? (type === "sort" ? -Infinity : "") : value(cell),
      orderSequence: text ? ["asc", "desc"] : ["desc", "asc"],
      columnControl: [{ extend: "dropdown", icon: "search", text: `filter by ${title}`, content: [text ? "searchList" : "searchNumber"] }],
    };
  }
  function make(place) {
    const { columns, rows, order } = tables[place.id], $ = dataTables.jQuery;
    const several = rows.length > 10;
    const table = $(place).DataTable({
      data: rows,
      columns: columns.map(column),
      order: order ?? [],
      ordering: { indicators: true, handler: true },
      deferRender: true,
      autoWidth: false,
      paging: rows.length > 25,
      pageLength: 25,
      lengthMenu: [25, 100, { label: "all", value: -1 }],
      language: { search: "Find", emptyTable: "nothing", info: "_START_ to _END_ of _TOTAL_", infoFiltered: "(of _MAX_)", lengthMenu: "_MENU_ lines" },
      layout: {
        topStart: { buttons: [{ extend: "copy", text: "copy" }, { extend: "csv", text: "CSV" }, { extend: "colvis", text: "columns" }] },
        topEnd: several ? "search" : null,
        bottomStart: several ? "info" : null,
        bottomEnd: rows.length > 25 ? ["pageLength", "paging"] : null,
      },
    });
    table.on("order", () => {
      const [first] = table.order();
      if (first && location.protocol !== "about:") history.replaceState(null, "", `#sort=${place.id}.${first[0]}.${first[1] === "asc" ? "ascending" : "descending"}`);
    });
    made.set(place.id, table);
    state.tables += 1;
    tell();
  }
  function makeTables() {
    for (const place of document.querySelectorAll(".data-table > table"))
      if (!made.has(place.id) && isOpen(place)) make(place);
  }

  // --- the address: a sorted table (#sort=TABLE.COLUMN.descending) or an open part (#dataset-NAME) can be sent
  function follow() {
    const asked = location.hash.match(/^#sort=([\w-]+)\.(\d+)\.(ascending|descending)$/);
    const place = asked ? document.getElementById(asked[1]) : location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!place) return;
    for (let part = place.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    makeTables();
    const table = asked && made.get(asked[1]);
    if (table && Number(asked[2]) < table.columns().count()) table.order([[Number(asked[2]), asked[3] === "ascending" ? "asc" : "desc"]]).draw();
    else if (!asked) place.scrollIntoView();
  }

  async function colours() {
    root.classList.toggle("dark", dark.matches);
    for (const place of [...views.keys()]) await draw(place);
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
  addEventListener("hashchange", follow);
  dark.addEventListener("change", colours);
  root.classList.toggle("dark", dark.matches);
  makeTables();
  follow();
  drawOpen();
})();
