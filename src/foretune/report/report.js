"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isNarrow = () => innerWidth < 640;
  const drawn = {};

  function colours(isDark) {
    return isDark
      ? { text: "#d9dce1", grid: "#363b44", zero: "#6b7280", mid: "#23272e", low: "#ef6a7a", high: "#5b9cf0" }
      : { text: "#2b2f36", grid: "#e3e5e9", zero: "#9aa0aa", mid: "#f7f7f5", low: "#b8283f", high: "#1f62b8" };
  }

  function themed(spec, isDark) {
    const c = colours(isDark);
    const layout = structuredClone(spec.layout);
    Object.assign(layout, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true });
    layout.font = { color: c.text, family: "system-ui, sans-serif", size: 12 };
    for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, { gridcolor: c.grid, zerolinecolor: c.zero });
    layout.hoverlabel = { bgcolor: isDark ? "#11141a" : "#ffffff", bordercolor: c.zero, font: { color: c.text } };
    const data = structuredClone(spec.data);
    for (const trace of data) {
      if (trace.type === "heatmap") trace.colorscale = [[0, c.low], [0.5, c.mid], [1, c.high]];
      if (isNarrow() && trace.mode === "markers+text") trace.mode = "markers";
    }
    if (isNarrow()) {
      if (spec.name === "curves") layout.showlegend = false;
      if (spec.extra.narrow_ticks) {
        layout.yaxis.ticktext = spec.extra.narrow_ticks;
        layout.margin.l = 112;
      }
    }
    return { data, layout };
  }

  function draw(spec, isDark) {
    const place = document.getElementById("figure-" + spec.name);
    if (spec.name === "curves") setCurves(spec);
    const { data, layout } = themed(spec, isDark);
    if (spec.name === "curves") highlight(data, spec.extra.names[picked.behaviour]);
    Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
    drawn[spec.name] = place;
  }

  // The curves' buttons.
  const picked = { metric: null, split: null, behaviour: -1 };
  function setCurves(spec) {
    const lines = spec.extra.series[picked.split];
    spec.data.forEach((trace, i) => { trace.x = lines[i].x; trace.y = lines[i][picked.metric] || []; });
    spec.layout.yaxis.title.text = spec.extra.metrics[picked.metric];
    spec.layout.yaxis.tickformat = picked.metric.endsWith("accuracy") ? ".0%" : "";
  }
  const opacityOf = (trace, name) => {
    if (trace.legendgroup === name) return 1;
    if (trace.fill === "toself") return 0; // bands are drawn one at a time
    return name === undefined ? 1 : 0.12;
  };
  function highlight(data, name) {
    for (const trace of data) trace.opacity = opacityOf(trace, name);
  }
  function buttons(place, label, choices, chosen, choose) {
    const group = document.createElement("div");
    group.className = "choices";
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", label);
    for (const [key, text] of choices) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.setAttribute("aria-pressed", String(key === chosen));
      button.addEventListener("click", () => {
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
        choose(key);
      });
      group.append(button);
    }
    place.append(group);
  }
  function curveControls(spec) {
    const place = document.getElementById("curve-controls");
    const redraw = () => draw(spec, dark.matches);
    picked.metric = Object.keys(spec.extra.metrics)[0];
    picked.split = spec.extra.splits[0];
    buttons(place, "what to draw", Object.entries(spec.extra.metrics), picked.metric, (key) => { picked.metric = key; redraw(); });
    if (spec.extra.splits.length > 1) {
      const splits = spec.extra.splits.map((name) => [name, name]);
      buttons(place, "which pairs", splits, picked.split, (key) => { picked.split = key; redraw(); });
    }
    const label = document.createElement("label");
    const select = document.createElement("select");
    label.append("highlight ", select);
    ["every behaviour", ...spec.extra.names].forEach((name, i) => select.append(new Option(name, i - 1)));
    select.addEventListener("change", () => { picked.behaviour = Number(select.value); redraw(); });
    place.append(label);
  }
  function hoverCurves(spec) {
    const place = drawn.curves;
    const fade = (name) => {
      const opacity = place.data.map((trace) => opacityOf(trace, name));
      Plotly.restyle(place, { opacity });
    };
    place.on("plotly_hover", (event) => fade(event.points[0].data.legendgroup));
    place.on("plotly_unhover", () => fade(spec.extra.names[picked.behaviour]));
  }

  function drawAll(isDark) { for (const spec of specs) draw(spec, isDark); }
  if (specs.length && window.Plotly) {
    const curves = specs.find((spec) => spec.name === "curves");
    if (curves) curveControls(curves);
    drawAll(dark.matches);
    if (curves) hoverCurves(curves);
    dark.addEventListener("change", () => drawAll(dark.matches));
    addEventListener("beforeprint", () => drawAll(false));
    addEventListener("afterprint", () => drawAll(dark.matches));
    let narrow = isNarrow();
    addEventListener("resize", () => { if (isNarrow() !== narrow) { narrow = isNarrow(); drawAll(dark.matches); } });
  }

  // Tables sorted by a click on a header.
  const headers = (table) => table.tHead.rows[table.tHead.rows.length - 1].cells;
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
  function sortBy(table, i, header) {
    const falls = header.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a, i), value(b, i)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return falls ? -order : order;
    });
    for (const other of headers(table)) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", falls ? "descending" : "ascending");
    body.append(...rows);
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    [...headers(table)].forEach((header, i) => {
      const button = header.querySelector("button");
      if (button) button.addEventListener("click", () => sortBy(table, i, header));
    });
  }
})();
