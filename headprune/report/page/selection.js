// The map of heads, the slider over the budget, what the selection costs, and the plan to download.
"use strict";

function startSelection(data, onChange) {
  const find = (id) => document.getElementById(id);
  const steps = data.steps.list;
  const own = data.plan || Logic.allKept(data.sites);
  const state = { selection: own, criterion: 0, step: null };
  const slider = find("budget");
  slider.max = Math.max(0, steps.length - 1);
  slider.disabled = steps.length < 2;
  fillChoices(find("criterion"), data.criteria.map((one) => one.name));

  const grid = makeGrid(find("map"), {
    label: "Heads by attention: Space keeps or drops a head", rows: mapRows(data, state),
    onFocus: (site, head) => find("head").replaceChildren(...headDetails(data, state, site, head)),
    onAct: (site, head) => choose(Logic.toggled(state.selection, site, head), null, [site, head]),
  });

  function choose(selection, step, focus) {
    if (!selection) {
      find("status").textContent = "That is the last head of the model; a plan keeps at least one.";
      return;
    }
    Object.assign(state, { selection, step });
    grid.update(mapRows(data, state));
    if (focus) find("head").replaceChildren(...headDetails(data, state, ...focus));
    show();
  }

  function show() {
    const onSlider = state.step !== null;
    const nearest = onSlider ? state.step : Logic.nearestStep(steps, state.selection);
    if (steps.length) slider.value = nearest;
    const isOwn = data.plan && Logic.same(state.selection, data.plan);
    const origin = isOwn ? "the run's plan" : onSlider ? `${stepText(data, nearest)} away` : "changed by hand";
    const kept = `${Logic.countKept(state.selection)} of ${Logic.countHeads(state.selection)} heads kept`;
    find("status").textContent = `${origin}: ${kept}`;
    slider.setAttribute("aria-valuetext", `${origin}: ${kept}`);
    find("reset").disabled = isOwn || !data.plan;
    find("readout").replaceChildren(...readout(data, state));
    onChange(state.selection);
  }

  slider.addEventListener("input", () => choose(steps[Number(slider.value)].keep, Number(slider.value)));
  find("reset").addEventListener("click", () => choose(own, null));
  find("criterion").addEventListener("change", (event) => {
    state.criterion = Number(event.target.value);
    grid.update(mapRows(data, state));
  });
  find("download").addEventListener("click", () => download("plan.json", JSON.stringify(editedPlan(data, state), null, 1) + "\n"));
  show();
}

function fillChoices(select, names) {
  select.replaceChildren(
    ...names.map((name, index) => Object.assign(document.createElement("option"), { value: index, textContent: name })),
  );
  select.disabled = names.length < 2;
}

function stepText(data, step) {
  return `${Logic.percent(data.steps.list[step].fraction)} of ${data.steps.quantity}`;
}

function mapRows(data, state) {
  const shown = data.criteria[state.criterion];
  return data.sites.map((site, s) => ({
    label: site.label, title: site.name,
    cells: site.kv_of_query.map((kv, head) => {
      const level = shown && shown.percentile[s] ? shown.percentile[s][head] : null;
      const kept = state.selection[s][head] === "1";
      const score = level === null ? "no score" : `${shown.name} ${Math.round(100 * level)} percent`;
      const starts = head > 0 && kv !== site.kv_of_query[head - 1] && site.kv_heads < site.kv_of_query.length;
      return {
        level, text: kept ? "" : "×", selected: kept, classes: [kept ? "kept" : "gone", ...(starts ? ["group"] : [])],
        name: `${site.name} head ${head}, ${kept ? "kept" : "removed"}, ${score}`,
      };
    }),
  }));
}

function entry(term, value, note) {
  const dt = Object.assign(document.createElement("dt"), { textContent: term });
  const dd = Object.assign(document.createElement("dd"), { textContent: value });
  if (note) dd.append(Object.assign(document.createElement("small"), { textContent: ` ${note}` }));
  return [dt, dd];
}

function readout(data, state) {
  const cost = Logic.cost(data, state.selection);
  const predicted = Logic.predicted(data, state.selection);
  const share = cost.denseParameters ? Logic.percent(cost.parameters / cost.denseParameters) : "–";
  const lines = [
    entry(cost.wholeModel ? "parameters" : "parameters of heads", `${cost.parameters.toLocaleString("en")} (${share})`),
    entry("attention FLOPs", Logic.percent(cost.flopsShare), `of dense, ${cost.length} tokens`),
  ];
  if (cost.cacheShare !== null) lines.push(entry("key/value cache", Logic.percent(cost.cacheShare), "of dense"));
  if (predicted) {
    const from = `between ${predicted.models} measured models`;
    const outside = "beyond what was measured";
    lines.push(
      entry(`${data.metrics.headline}, predicted`, Logic.number(predicted.quality), predicted.quality === null ? outside : from),
      entry("latency, predicted", Logic.percent(predicted.latencyShare), predicted.latencyShare === null ? outside : `of dense, ${from}`),
    );
  }
  const increase = data.sensitivity && Logic.predictedIncrease(data.sensitivity, state.selection);
  if (increase) {
    const how = increase.inOrder ? "sum of each attention's curve" : "by the number of heads gone, in another order than the curves'";
    lines.push(entry("loss increase, predicted", Logic.number(increase.increase), how));
  }
  for (const one of Logic.measuredAt(data, state.selection, state.step !== null)) {
    const quality = `${data.metrics.headline} ${Logic.number(one.quality[data.metrics.headline])}`;
    lines.push(entry(`measured (${one.source})`, `${quality}, latency ${Logic.percent(one.latency_share)}`, "of dense"));
  }
  return lines.flat();
}

function headDetails(data, state, s, head) {
  const site = data.sites[s];
  const title = Object.assign(document.createElement("h3"), { textContent: `${site.name}, head ${head}` });
  const list = document.createElement("dl");
  list.append(...entry("in this selection", state.selection[s][head] === "1" ? "kept" : "removed"));
  if (site.kv_heads < site.kv_of_query.length) list.append(...entry("reads key/value head", String(site.kv_of_query[head])));
  for (const one of data.criteria) {
    if (!one.scores[s]) list.append(...entry(one.name, "not reached by the data"));
    else {
      const spread = one.spread && one.spread[s] ? ` ± ${Logic.number(one.spread[s][head])}` : "";
      const rank = `percentile ${Math.round(100 * one.percentile[s][head])}`;
      list.append(...entry(one.name, Logic.number(one.scores[s][head]) + spread, rank));
    }
  }
  if (data.unsettled[s].includes(head)) list.append(...entry("unsettled", "other calibration samples might decide otherwise"));
  const portrait = data.portraits && data.portraits[s] && data.portraits[s][head];
  if (portrait) {
    list.append(...entry("attends to", portrait.labels.join(", ")));
    for (const [name, value] of Object.entries(portrait.evidence)) list.append(...entry(name.replaceAll("_", " "), Logic.number(value)));
  }
  return [title, list];
}

function editedPlan(data, state) {
  const isOwn = data.plan && Logic.same(state.selection, data.plan);
  if (isOwn) return data.plan_document;
  const budget = state.step === null ? null : { [data.steps.quantity]: data.steps.list[state.step].fraction };
  return Logic.planDocument(data.plan_document, data.sites, state.selection, budget);
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
