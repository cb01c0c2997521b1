// Names and settings come from reports that anybody may have written: they reach the page as text nodes only.
const data = JSON.parse(document.getElementById("data").textContent);
const shown = { runs: data.rows.map(() => true), columns: data.columns.map((column) => column.shown) };
const SVG = "http://www.w3.org/2000/svg";

function byId(id) {
  return document.getElementById(id);
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Colour, marker and dashes change together, so that no run is told by its colour alone.
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const MARKS = [
  (x, y) => drawn("circle", { cx: x, cy: y, r: 3.4 }),
  (x, y) => drawn("rect", { x: x - 3, y: y - 3, width: 6, height: 6 }),
  (x, y) => drawn("path", { d: `M${x} ${y - 4}L${x + 4} ${y + 3}H${x - 4}Z` }),
  (x, y) => drawn("path", { d: `M${x} ${y - 4.4}L${x + 4.4} ${y}L${x} ${y + 4.4}L${x - 4.4} ${y}Z` }),
  (x, y) => drawn("path", { d: `M${x} ${y + 4}L${x + 4} ${y - 3}H${x - 4}Z` }),
  (x, y) => drawn("path", { d: `M${x - 4} ${y}H${x + 4}M${x} ${y - 4}V${y + 4}` }),
  (x, y) => drawn("path", { d: `M${x - 3} ${y - 3}L${x + 3} ${y + 3}M${x - 3} ${y + 3}L${x + 3} ${y - 3}` }),
];

function colour(row) {
  return `k${row % 7}`;
}

function dashes(row) {
  return DASHES[Math.floor(row / 7) % DASHES.length];
}

function mark(row, x, y, on) {
  const made = MARKS[row % MARKS.length](x, y);
  made.setAttribute("class", on ? "mark on" : "mark");
  return made;
}

function swatch(row) {
  const line = drawn("path", { d: "M1 6H31", class: "stroke", "stroke-dasharray": dashes(row) });
  return drawn("svg", { class: `swatch ${colour(row)}`, viewBox: "0 0 32 12", "aria-hidden": "true" }, line, mark(row, 16, 6, true));
}

function number(value, digits) {
  if (value === null) return "n/a";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 1).replace("-", "\u2212").replace("e\u2212", "e-");
  const text = Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 12 });
  return text.replace("-", "\u2212");
}

function withError(value, error) {
  return error === null ? number(value, 4) : `${number(value, 4)} ± ${number(error, 2)}`;
}

function checkbox(checked, change, ...label) {
  const box = element("input", { type: "checkbox", checked });
  box.addEventListener("change", () => change(box.checked));
  return element("label", { class: "check" }, box, ...label);
}
