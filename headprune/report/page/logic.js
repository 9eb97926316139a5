// What the page computes, apart from what it shows: functions of values, without the document.
// A selection is a list of texts, one for each attention: "1" for a head that stays, "0" for one that goes.
"use strict";

const Logic = {
  countKept(selection) {
    return selection.reduce((sum, bits) => sum + bits.split("1").length - 1, 0);
  },

  countHeads(selection) {
    return selection.reduce((sum, bits) => sum + bits.length, 0);
  },

  // The selection with one head switched, or null where that would leave the model without any head.
  toggled(selection, site, head) {
    const bits = selection[site];
    const switched = bits.slice(0, head) + (bits[head] === "1" ? "0" : "1") + bits.slice(head + 1);
    const found = selection.map((other, index) => (index === site ? switched : other));
    return Logic.countKept(found) ? found : null;
  },

  same(one, other) {
    return one.length === other.length && one.every((bits, index) => bits === other[index]);
  },

  // Key/value heads that a kept query head still reads.
  keptKvHeads(site, bits) {
    return new Set(site.kv_of_query.filter((_, head) => bits[head] === "1")).size;
  },

  // The costs of attentions by count: parameters of heads, FLOPs on one sequence (2 per multiply-add: the four projections, QK^T
  // and PV), and features in the key/value cache.
  attentionCost(sites, selection, length) {
    const total = { parameters: 0, flops: 0, cache: 0 };
    sites.forEach((site, index) => {
      const queries = selection[index].split("1").length - 1;
      const kv = Logic.keptKvHeads(site, selection[index]);
      const width = site.head_dim + site.value_dim;
      total.parameters += queries * site.query_head_parameters + kv * site.kv_head_parameters;
      total.flops += 2 * length * site.hidden_size * (queries + kv) * width + 2 * length * length * queries * width;
      total.cache += kv * width;
    });
    return total;
  },

  allKept(sites) {
    return sites.map((site) => "1".repeat(site.kv_of_query.length));
  },

  // Costs of a selection beside those of the dense model; parameters are of the whole model where that was counted, else of heads.
  // cacheShare: null where the model keeps no cache.
  cost(data, selection) {
    const length = data.counted ? data.counted.sequence_length : 512;
    const dense = Logic.attentionCost(data.sites, Logic.allKept(data.sites), length);
    const found = Logic.attentionCost(data.sites, selection, length);
    const whole = data.counted ? data.counted.parameters : dense.parameters;
    const uncached = data.counted && data.counted.kv_cache_bytes_per_token === null;
    return {
      length,
      wholeModel: Boolean(data.counted),
      parameters: whole - (dense.parameters - found.parameters),
      denseParameters: whole,
      flops: found.flops,
      flopsShare: found.flops / dense.flops,
      cacheShare: uncached ? null : dense.cache ? found.cache / dense.cache : 1,
    };
  },

  // y at x on the line through points [[x, y], ...]; null outside of them or with fewer than two.
  interpolated(points, x) {
    const sorted = [...points].sort((a, b) => a[0] - b[0]);
    for (let index = 1; index < sorted.length; index++) {
      const [x0, y0] = sorted[index - 1];
      const [x1, y1] = sorted[index];
      if (x0 <= x && x <= x1) return x1 === x0 ? (y0 + y1) / 2 : y0 + ((x - x0) / (x1 - x0)) * (y1 - y0);
    }
    return null;
  },

  // Quality and latency (share of dense) as interpolated over the parameters of the models that were measured.
  predicted(data, selection) {
    if (!data.metrics || !data.counted) return null;
    const x = Logic.cost(data, selection).parameters;
    const points = (value) => data.measured.map((one) => [one.parameters, value(one)]).filter((point) => point[1] !== null);
    return {
      models: data.measured.length,
      quality: Logic.interpolated(points((one) => one.quality[data.metrics.headline]), x),
      latencyShare: Logic.interpolated(points((one) => one.latency_share), x),
    };
  },

  // Loss increase as the sum over attentions of the measured curve at the number of heads gone: exact for one attention alone,
  // else an estimate, as attentions make up for one another. inOrder: whether the heads that go are the curves' own.
  predictedIncrease(sensitivity, selection) {
    let increase = 0;
    let inOrder = true;
    for (const [site, bits] of selection.entries()) {
      const curve = sensitivity.increase[site];
      const gone = [...bits].flatMap((bit, head) => (bit === "0" ? [head] : []));
      if (!curve) {
        if (gone.length) return null;
        continue;
      }
      const first = new Set(sensitivity.order[site].slice(0, gone.length));
      inOrder = inOrder && gone.every((head) => first.has(head));
      increase += curve[gone.length];
    }
    return { increase, inOrder };
  },

  // The measured models that are this very selection (or, in a sweep, have as many heads at each attention on the slider).
  measuredAt(data, selection, onSlider) {
    const counts = selection.map((bits) => bits.split("1").length - 1);
    return data.measured.filter((one) => {
      if (one.keep) return Logic.same(one.keep, selection);
      return onSlider && one.counts.every((count, site) => count === counts[site]);
    });
  },

  // Which of [{cost, quality}] no other one beats in both, cost lower and quality better.
  paretoFront(points, higherIsBetter) {
    const sign = higherIsBetter ? 1 : -1;
    const beats = (b, a) =>
      b.cost <= a.cost && sign * b.quality >= sign * a.quality && (b.cost < a.cost || sign * b.quality > sign * a.quality);
    return points.map((a) => !points.some((b) => beats(b, a)));
  },

  // The step whose selection this is, else the one with the nearest number of heads.
  nearestStep(steps, selection) {
    const exact = steps.findIndex((step) => Logic.same(step.keep, selection));
    if (exact >= 0) return exact;
    const kept = Logic.countKept(selection);
    let best = 0;
    steps.forEach((step, index) => {
      const distance = (one) => Math.abs(Logic.countKept(one.keep) - kept);
      if (distance(step) < distance(steps[best])) best = index;
    });
    return best;
  },

  // plan.json with this selection; budget: {quantity: fraction} of the slider, null for a selection by hand.
  planDocument(original, sites, selection, budget) {
    const edited = JSON.parse(JSON.stringify(original));
    edited.budget = budget;
    sites.forEach((site, index) => {
      edited.sites[site.name].keep = [...selection[index]].flatMap((bit, head) => (bit === "1" ? [head] : []));
    });
    return edited;
  },

  // Where a key leads in a grid whose rows have these lengths; null for keys that lead nowhere.
  nextCell(lengths, row, column, key, withControl) {
    const within = (r, c) => [r, Math.max(0, Math.min(c, lengths[r] - 1))];
    const last = lengths.length - 1;
    const moves = {
      ArrowLeft: () => within(row, column - 1),
      ArrowRight: () => within(row, column + 1),
      ArrowUp: () => within(Math.max(0, row - 1), column),
      ArrowDown: () => within(Math.min(last, row + 1), column),
      Home: () => (withControl ? within(0, 0) : within(row, 0)),
      End: () => (withControl ? within(last, lengths[last] - 1) : within(row, lengths[row] - 1)),
    };
    return moves[key] ? moves[key]() : null;
  },

  // Round numbers that span [low, high]: about `count` of them.
  ticks(low, high, count) {
    const span = high - low || Math.abs(high) || 1;
    const rough = span / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value);
    return found;
  },

  percent(share) {
    return share === null ? "–" : `${(100 * share).toFixed(1)} %`;
  },

  number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  },
};
