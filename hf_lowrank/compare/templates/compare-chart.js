const chart = { index: 0, logX: false, logY: false, at: null, scales: null };
const MARGIN = { top: 26, right: 16, bottom: 44, left: 58 };

function visibleLines() {
  return data.charts[chart.index].lines.filter((line) => shown.runs[line.row]);
}

function places() {
  return [...new Set(visibleLines().flatMap((line) => line.x))].sort((a, b) => a - b);
}

function extent(values, log) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value !== null && (!log || value > 0)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  if (low === Infinity) return [log ? 1 : 0, log ? 10 : 1];
  if (low === high) return log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  return [low, high];
}

function scale(domain, range, log) {
  const [a, b] = log ? domain.map(Math.log10) : domain;
  const to = (value) => range[0] + (((log ? Math.log10(value) : value) - a) / (b - a)) * (range[1] - range[0]);
  return Object.assign(to, { domain, range, log });
}

function ticks([low, high], count, log) {
  if (log) {
    const powers = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of Math.log10(high / low) < 1.6 ? [1, 2, 3, 5, 7] : Math.log10(high / low) < 4 ? [1, 3] : [1]) {
        const value = factor * 10 ** power;
        if (value >= low && value <= high) powers.push(value);
      }
    }
    if (powers.length > 1) return powers.filter((_, index) => index % Math.ceil(powers.length / (count * 2)) === 0);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let index = Math.ceil(low / step); index * step <= high * (1 + 1e-12); index++) found.push(Number((index * step).toPrecision(12)));
  return found;
}

function scales(width, height) {
  const lines = visibleLines();
  const ys = lines.flatMap((line) => line.y.flatMap((y, i) => [y, y - (line.error[i] || 0), y + (line.error[i] || 0)]));
  const onLog = lines.flatMap((line) => line.y);
  let [low, high] = chart.logY ? extent(onLog, true) : extent(ys, false);
  const margin = (high - low) * 0.05;
  const domain = chart.logY ? [low / 1.15, high * 1.15] : [low - margin, high + margin];
  const xs = extent(lines.flatMap((line) => line.x), chart.logX);
  return {
    x: scale(xs, [MARGIN.left, width - MARGIN.right], chart.logX),
    y: scale(domain, [height - MARGIN.bottom, MARGIN.top], chart.logY),
  };
}

function tick(value) {
  return number(value, 4).replace(/\.?0+e/, "e");
}

function axes(shape, width, height, about) {
  const group = drawn("g", {});
  const text = (x, y, words, anchor) => drawn("text", { x, y, "text-anchor": anchor }, words);
  for (const value of ticks(shape.y.domain, 5, shape.y.log)) {
    const y = shape.y(value);
    group.append(drawn("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y, class: "grid" }));
    group.append(text(MARGIN.left - 8, y + 4, tick(value), "end"));
  }
  const bottom = height - MARGIN.bottom;
  group.append(drawn("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom, class: "axis" }));
  for (const value of ticks(shape.x.domain, Math.max(2, Math.min(8, Math.floor(width / 90))), shape.x.log)) {
    group.append(drawn("line", { x1: shape.x(value), x2: shape.x(value), y1: bottom, y2: bottom + 5, class: "axis" }));
    group.append(text(shape.x(value), bottom + 19, tick(value), "middle"));
  }
  group.append(text((MARGIN.left + width - MARGIN.right) / 2, height - 6, about.x_label, "middle"));
  group.append(text(4, 14, about.y_label, "start"));
  return group;
}

function drawLine(line, shape) {
  const group = drawn("g", { class: colour(line.row), "data-row": line.row });
  const usable = line.x.map((x, i) => i).filter((i) => (!chart.logX || line.x[i] > 0) && (!chart.logY || line.y[i] > 0));
  const at = usable.map((i) => [shape.x(line.x[i]), shape.y(line.y[i])]);
  const floor = shape.y.domain[0];
  const clip = (value) => shape.y(Math.max(value, floor));
  const errors = usable.filter((i) => line.error[i] !== null);
  if (errors.length > 1) {
    const up = errors.map((i) => `${shape.x(line.x[i])} ${clip(line.y[i] + line.error[i])}`);
    const down = errors.map((i) => `${shape.x(line.x[i])} ${clip(line.y[i] - line.error[i])}`).reverse();
    group.append(drawn("path", { d: `M${up.join("L")}L${down.join("L")}Z`, class: "band" }));
  } else {
    for (const i of errors) {
      const x = shape.x(line.x[i]);
      group.append(drawn("line", { x1: x, x2: x, y1: clip(line.y[i] - line.error[i]), y2: clip(line.y[i] + line.error[i]), class: "bar" }));
    }
  }
  if (at.length > 1) {
    group.append(drawn("path", { d: `M${at.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`, class: "stroke", "stroke-dasharray": dashes(line.row) }));
  }
  const every = Math.ceil(at.length / 20);
  at.forEach(([x, y], i) => {
    if (at.length <= 40 || i % every === 0) group.append(mark(line.row, x, y, false));
  });
  return group;
}

function drawCursor(shape, height) {
  if (chart.at === null || (chart.logX && chart.at <= 0)) return [];
  const x = shape.x(chart.at);
  const parts = [drawn("line", { x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom, class: "cursor" })];
  for (const line of visibleLines()) {
    const i = line.x.indexOf(chart.at);
    if (i >= 0 && (!chart.logY || line.y[i] > 0)) {
      parts.push(drawn("g", { class: colour(line.row) }, mark(line.row, x, shape.y(line.y[i]), true)));
    }
  }
  return parts;
}

function renderChart() {
  const about = data.charts[chart.index];
  const box = byId("chart");
  const width = Math.max(260, box.clientWidth), height = Math.round(Math.min(430, Math.max(260, width * 0.52)));
  const lines = about.lines;
  byId("log-y").disabled = !lines.some((line) => line.y.some((y) => y > 0));
  byId("log-x").disabled = lines.some((line) => line.x.some((x) => x < 0)) || about.x_label.startsWith("layer");
  chart.logY = byId("log-y").checked && !byId("log-y").disabled;
  chart.logX = byId("log-x").checked && !byId("log-x").disabled;
  const shape = scales(width, height);
  chart.scales = shape;
  const title = about.detail ? `${about.title}, ${about.detail}` : about.title;
  box.setAttribute("aria-label", `Chart: ${title}. ${visibleLines().length} of ${lines.length} runs.`);
  byId("chart-title").replaceChildren(about.title, element("span", { class: "sub" }, about.detail));
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" }, axes(shape, width, height, about));
  svg.append(...visibleLines().map((line) => drawLine(line, shape)), ...drawCursor(shape, height));
  box.replaceChildren(svg);
  renderReadout(about);
}

function renderReadout(about) {
  const said = [];
  byId("legend").querySelectorAll("[data-row]").forEach((entry) => {
    const row = Number(entry.dataset.row);
    const line = about.lines.find((one) => one.row === row);
    const i = line && chart.at !== null ? line.x.indexOf(chart.at) : -1;
    const text = !line ? "no data" : i < 0 ? "" : withError(line.y[i], line.error[i]);
    entry.querySelector(".at").textContent = text;
    if (i >= 0 && shown.runs[row]) said.push(`${data.rows[row].label} ${text}`);
  });
  const place = chart.at === null ? "" : `${about.x_label} ${number(chart.at, 6)}`;
  byId("legend").querySelector(".place").textContent = place;
  byId("readout").textContent = place ? `${place}: ${said.join(", ") || "no value"}` : "";
}

function moveCursor(event) {
  const box = byId("chart").getBoundingClientRect();
  const x = event.clientX - box.left;
  const near = places().filter((place) => !chart.logX || place > 0);
  if (!near.length) return;
  chart.at = near.reduce((best, place) => (Math.abs(chart.scales.x(place) - x) < Math.abs(chart.scales.x(best) - x) ? place : best));
  renderChart();
}

function keyCursor(event) {
  const all = places();
  const now = all.indexOf(chart.at);
  const target = { ArrowLeft: Math.max(0, now - 1), ArrowRight: Math.min(all.length - 1, now + 1), Home: 0, End: all.length - 1 }[event.key];
  if (event.key === "Escape") chart.at = null;
  else if (target === undefined || !all.length) return;
  else chart.at = all[target];
  event.preventDefault();
  renderChart();
}

function renderValues() {
  const holder = byId("chart-data");
  if (!holder.open) return;
  const about = data.charts[chart.index];
  const lines = visibleLines();
  const head = element("tr", {}, element("th", { scope: "col" }, about.x_label));
  head.append(...lines.map((line) => element("th", { scope: "col" }, data.rows[line.row].label)));
  const body = places().map((place) => {
    const cells = lines.map((line) => {
      const i = line.x.indexOf(place);
      return element("td", {}, i < 0 ? "" : withError(line.y[i], line.error[i]));
    });
    return element("tr", {}, element("th", { scope: "row" }, number(place, 6)), ...cells);
  });
  holder.querySelector("thead").replaceChildren(head);
  holder.querySelector("tbody").replaceChildren(...body);
}

function buildChartChoice() {
  for (const group of new Set(data.charts.map((one) => one.group))) {
    const options = element("optgroup", { label: group });
    data.charts.forEach((one, index) => {
      if (one.group === group) options.append(element("option", { value: index }, one.detail ? `${one.title} (${one.detail})` : one.title));
    });
    byId("chart-choice").append(options);
  }
}

function startChart() {
  if (!data.charts.length) {
    byId("curves").replaceChildren(element("p", { class: "muted" }, "None of the runs has curves."));
    return;
  }
  buildChartChoice();
  byId("chart-choice").addEventListener("change", (event) => {
    chart.index = Number(event.target.value);
    chart.at = null;
    renderChart();
    renderValues();
  });
  for (const id of ["log-y", "log-x"]) byId(id).addEventListener("change", renderChart);
  byId("chart").addEventListener("pointermove", moveCursor);
  byId("chart").addEventListener("pointerdown", moveCursor);
  byId("chart").addEventListener("keydown", keyCursor);
  byId("chart-data").addEventListener("toggle", renderValues);
  new ResizeObserver(() => renderChart()).observe(byId("chart"));
  renderChart();
}
