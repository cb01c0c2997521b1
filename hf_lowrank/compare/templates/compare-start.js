// A run is chosen in two places, above the table and in the chart's legend: both show the same choice.
function chooseRun(row, on) {
  shown.runs[row] = on;
  document.querySelectorAll(`[data-row-choice="${row}"] input`).forEach((box) => {
    box.checked = on;
  });
  renderTable();
  if (data.scatter.quantities.length > 1) {
    plot.at = null;
    renderScatter();
  }
  if (data.heat.length) {
    heat.at = null;
    renderHeat();
  }
  if (data.charts.length) {
    renderChart();
    renderValues();
  }
}

function runChoices(holder, withValues) {
  data.rows.forEach((row, index) => {
    const parts = [swatch(index), element("span", {}, row.label)];
    if (withValues) parts.push(element("span", { class: "at" }));
    const choice = checkbox(true, (on) => chooseRun(index, on), ...parts);
    choice.dataset.rowChoice = index;
    if (withValues) choice.dataset.row = index;
    holder.append(choice);
  });
}

byId("legend").append(element("div", { class: "place", "aria-hidden": "true" }));
runChoices(byId("run-choice"), false);
runChoices(byId("legend"), true);
startTable();
startChart();
startScatter();
startHeat();
startView();
