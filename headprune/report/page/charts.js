// The chart of quality over latency: measured models as points, the front that none of them beats as a line.
"use strict";

const SIZE = { width: 680, height: 380, left: 70, right: 20, top: 16, bottom: 52 };

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function scaleOf(values, from, to) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const margin = 0.06 * (high - low || Math.abs(high) || 1);
  const start = low - margin;
  const end = high + margin;
  const place = (value) => from + ((value - start) / (end - start)) * (to - from);
  return { place, ticks: Logic.ticks(start, end, 6) };
}

// points: [{cost, quality, label, kind}]; kind: dense, sweep or chosen. Returns {mark(cost, quality)}, which places the slider's sign
// (hides it where one of them is null).
function qualityChart(container, points, axes, higherIsBetter) {
  const x = scaleOf(points.map((one) => one.cost), SIZE.left, SIZE.width - SIZE.right);
  const y = scaleOf(points.map((one) => one.quality), SIZE.height - SIZE.bottom, SIZE.top);
  const chart = svg("svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, class: "chart", role: "group", "aria-label": axes.label });
  chart.append(axesOf(x, y, axes));
  const front = Logic.paretoFront(points, higherIsBetter);
  const onFront = points.filter((_, index) => front[index]).sort((a, b) => a.cost - b.cost);
  const path = onFront.map((one) => `${x.place(one.cost)},${y.place(one.quality)}`).join(" ");
  chart.append(svg("polyline", { points: path, class: "front" }));
  const sign = svg("path", { d: "M0,-9 L9,0 L0,9 L-9,0 Z", class: "sign", visibility: "hidden" });
  sign.append(svg("title", {}, "the selection of heads above, predicted"));
  points.forEach((one, index) => chart.append(pointOf(one, x.place(one.cost), y.place(one.quality), front[index])));
  chart.append(sign);
  container.replaceChildren(chart);
  return {
    mark(cost, quality) {
      const shown = cost !== null && quality !== null;
      sign.setAttribute("visibility", shown ? "visible" : "hidden");
      if (shown) sign.setAttribute("transform", `translate(${x.place(cost)} ${y.place(quality)})`);
    },
  };
}

function pointOf(one, cx, cy, onFront) {
  const said = `${one.label}${onFront ? ", no other is better in both" : ""}`;
  const group = svg("g", { transform: `translate(${cx} ${cy})`, class: `point ${one.kind}`, tabindex: 0, role: "img", "aria-label": said });
  const shapes = { dense: ["rect", { x: -6, y: -6, width: 12, height: 12 }], chosen: ["path", { d: star(10) }] };
  const [tag, attributes] = shapes[one.kind] || ["circle", { r: 6 }];
  group.append(svg(tag, attributes), svg("title", {}, said));
  return group;
}

function star(radius) {
  const corners = Array.from({ length: 10 }, (_, index) => {
    const angle = (Math.PI * index) / 5 - Math.PI / 2;
    const length = index % 2 ? radius * 0.45 : radius;
    return `${(length * Math.cos(angle)).toFixed(2)},${(length * Math.sin(angle)).toFixed(2)}`;
  });
  return `M${corners.join(" L")} Z`;
}

function axesOf(x, y, axes) {
  const group = svg("g", { class: "axes", "aria-hidden": "true" });
  const bottom = SIZE.height - SIZE.bottom;
  for (const tick of x.ticks) {
    const at = x.place(tick);
    group.append(svg("line", { x1: at, x2: at, y1: SIZE.top, y2: bottom }));
    group.append(svg("text", { x: at, y: bottom + 18, "text-anchor": "middle" }, Logic.number(tick)));
  }
  for (const tick of y.ticks) {
    const at = y.place(tick);
    group.append(svg("line", { x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: at, y2: at }));
    group.append(svg("text", { x: SIZE.left - 8, y: at + 4, "text-anchor": "end" }, Logic.number(tick)));
  }
  const middle = (SIZE.top + bottom) / 2;
  group.append(svg("text", { x: (SIZE.left + SIZE.width) / 2, y: SIZE.height - 12, "text-anchor": "middle", class: "name" }, axes.x));
  group.append(
    svg("text", { x: 16, y: middle, "text-anchor": "middle", class: "name", transform: `rotate(-90 16 ${middle})` }, axes.y),
  );
  return group;
}
