// Puts the page together from the numbers that it carries.
"use strict";

function startPage() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = showChart(data);
  startSelection(data, (selection) => {
    const predicted = chart && Logic.predicted(data, selection);
    if (predicted) chart.mark(predicted.latencyShare, predicted.quality);
  });
  showSensitivity(data);
  showAgreement(data);
  showCriteria(data);
  document.getElementById("without").remove();
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
}

function showChart(data) {
  const container = document.getElementById("chart");
  if (!container) return null;
  const { headline, higher_is_better: higher } = data.metrics;
  const points = data.measured
    .filter((one) => one.latency_share !== null && one.quality[headline] !== null)
    .map((one) => ({
      cost: one.latency_share, quality: one.quality[headline],
      kind: one.chosen ? "chosen" : one.latency_share === 1 ? "dense" : "sweep",
      label: `${one.chosen ? "the run's plan" : one.label} (${one.source}): ${headline} ${Logic.number(one.quality[headline])}, latency ` +
        `${Logic.number(one.latency_p50_ms)} ms, ${Logic.percent(one.latency_share)} of dense`,
    }));
  const y = `${headline} (${higher ? "higher" : "lower"} is better)`;
  return qualityChart(container, points, { x: "latency p50, share of dense", y, label: `${headline} over latency` }, higher);
}

function showSensitivity(data) {
  const container = document.getElementById("sensitivity");
  if (!container) return;
  const { increase, samples } = data.sensitivity;
  const most = Math.max(1e-12, ...increase.flatMap((curve) => curve || []));
  const words = (s, gone) => `${data.sites[s].name}: loss ${increase[s][gone] < 0 ? "" : "+"}${Logic.number(increase[s][gone])} with ` +
    `${gone} of ${increase[s].length - 1} heads gone`;
  const rows = data.sites.map((site, s) => ({
    label: site.label, title: site.name,
    cells: (increase[s] || []).slice(1).map((value, index) => ({
      level: Math.sqrt(Math.max(0, value) / most), text: "", name: words(s, index + 1),
    })),
  }));
  const longest = Math.max(...rows.map((row) => row.cells.length));
  const says = document.getElementById("sensitivity-text");
  makeGrid(container, {
    label: `Loss increase over ${samples} samples by attention and number of heads gone`, rows,
    columns: Array.from({ length: longest }, (_, index) => String(index + 1)),
    onFocus: (s, index) => (says.textContent = words(s, index + 1)),
  });
}

function showAgreement(data) {
  const container = document.getElementById("agreement");
  if (!container) return;
  const { criteria, spearman, overlap, keep } = data.agreement;
  const words = (one, other) => `${criteria[one]} and ${criteria[other]}: Spearman ${Logic.number(spearman[one][other])} over all heads; of ` +
    `the best ${Logic.percent(keep)}, ${Logic.percent(overlap[one][other])} are the same`;
  const rows = criteria.map((name, one) => ({
    label: name, title: name,
    cells: criteria.map((_, other) => ({
      level: spearman[one][other] === null ? null : Math.max(0, spearman[one][other]),
      text: spearman[one][other] === null ? "–" : spearman[one][other].toFixed(2), name: words(one, other), classes: ["wide"],
    })),
  }));
  const says = document.getElementById("agreement-text");
  makeGrid(container, {
    label: "Agreement of criteria", rows, columns: criteria, onFocus: (one, other) => (says.textContent = words(one, other)),
  });
}

function showCriteria(data) {
  const container = document.getElementById("criteria");
  if (!container) return;
  const own = data.plan || Logic.allKept(data.sites);
  data.criteria.forEach((one, criterion) => {
    const figure = document.createElement("figure");
    const place = document.createElement("div");
    figure.append(Object.assign(document.createElement("figcaption"), { textContent: one.name }), place);
    container.append(figure);
    makeGrid(place, {
      label: `${one.name}: percentile of each head, and the run's plan`, rows: mapRows(data, { selection: own, criterion }),
      onFocus: (s, head) => document.getElementById("head").replaceChildren(...headDetails(data, { selection: own }, s, head)),
    });
  });
}

startPage();
