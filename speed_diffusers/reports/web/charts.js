/* Line charts and maps of values, small and without a library; reports/web_page.py and demo/app.py put them into pages.
   SpeedCharts.line(host, spec) and SpeedCharts.map(host, spec) draw into an element, again whenever its width changes,
   and return a function that takes the next spec. */
"use strict";
window.SpeedCharts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
  const MARGIN = { left: 54, right: 14, top: 18, bottom: 36 };

  function element(name, parent, properties = {}, text) {
    const made = document.createElement(name);
    Object.assign(made, properties);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function shape(name, parent, attributes = {}, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  /* 0.00123 -> "0.00123", 12345 -> "12.3k", 2.5e7 -> "25M", 1e-7 -> "1e-7". */
  function format(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (value < 0) return `−${format(size, digits)}`;
    if (size < 1e-3 || size >= 1e12) return value.toExponential(Math.max(0, digits - 1)).replace(/\.?0*e\+?/, "e").replace("-", "−");
    for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
      if (size >= unit) return `${Number((value / (name === "k" ? 1e3 : unit)).toPrecision(digits))}${name}`;
    }
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9); tick * step <= high + 1e-9 * step; tick++) {
      ticks.push(Number((tick * step).toPrecision(12)));
    }
    return ticks;
  }

  function logTicks(low, high) {
    const decades = Math.log10(high / low);
    if (decades < 0.6) return linearTicks(low, high, 4);
    const ticks = [];
    const every = Math.ceil(decades / 6);
    const factors = decades > 2 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      if (power % every && decades > 2) continue;
      for (const factor of factors) {
        const tick = Number((factor * 10 ** power).toPrecision(12));
        if (tick >= low * 0.9999 && tick <= high * 1.0001) ticks.push(tick);
      }
    }
    return ticks;
  }

  /* From values to pixels, with the way back. */
  function scale(low, high, log, from, to) {
    const apply = log ? Math.log : (value) => value;
    const [first, span] = [apply(low), apply(high) - apply(low) || 1];
    const pixel = (value) => from + ((apply(value) - first) / span) * (to - from);
    pixel.back = (at) => {
      const value = first + ((at - from) / (to - from)) * span;
      return log ? Math.exp(value) : value;
    };
    return pixel;
  }

  function range(values, log) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (value === null || value === undefined || (log && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return low <= high ? [low, high] : null;
  }

  function padded([low, high], log) {
    if (log) return low === high ? [low / 1.5, high * 1.5] : [low * (low / high) ** 0.06, high * (high / low) ** 0.06];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  }

  function nearest(values, wanted) {
    let found = -1;
    for (let index = 0; index < values.length; index++) {
      if (values[index] === null) continue;
      if (found < 0 || Math.abs(values[index] - wanted) < Math.abs(values[found] - wanted)) found = index;
    }
    return found;
  }

  /* An element that is drawn anew when its spec or its width changes. */
  function mounted(host, draw, first) {
    let spec = first, width = 0;
    host.classList.add("chart");
    const redraw = () => {
      width = host.clientWidth;
      if (!width || !spec) return;
      host.replaceChildren();
      draw(host, spec, width, spec.height || 220);
    };
    const observer = new ResizeObserver(() => { if (host.clientWidth !== width) redraw(); });
    observer.observe(host);
    redraw();
    return (next) => { spec = next; redraw(); };
  }

  function frame(host, spec, width, height) {
    const svg = shape("svg", host, { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.label || "" });
    const box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    return { svg, box };
  }

  function axes(svg, box, x, y, xTicks, yTicks, spec) {
    for (const tick of yTicks) {
      const at = y(tick);
      shape("line", svg, { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at });
      shape("text", svg, { x: box.left - 7, y: at + 4, "text-anchor": "end" }, (spec.y.format || format)(tick));
    }
    shape("line", svg, { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
    let used = -Infinity;
    for (const tick of [...xTicks].sort((one, other) => x(one) - x(other))) {
      const at = x(tick), text = (spec.x.format || format)(tick), half = text.length * 3.2;
      shape("line", svg, { class: "axis", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 });
      if (at - half < used + 6) continue;
      shape("text", svg, { x: Math.min(at, box.right + MARGIN.right - half), y: box.bottom + 16, "text-anchor": "middle" }, text);
      used = at + half;
    }
    shape("text", svg, { x: (box.left + box.right) / 2, y: box.bottom + 32, "text-anchor": "middle" }, spec.x.label || "");
    if (spec.y.label) shape("text", svg, { x: 0, y: 9 }, spec.y.label);
  }

  function showTip(tip, host, at, lines) {
    tip.replaceChildren();
    element("b", tip, {}, lines.title);
    for (const { color, dash, name, value } of lines.rows) {
      const row = element("div", tip, { className: "row" });
      const key = element("span", row, { className: "chart-key" });
      key.style.borderColor = color || "transparent";
      key.style.borderTopStyle = dash ? "dashed" : "solid";
      element("span", row, {}, name);
      element("b", row, {}, value);
    }
    tip.hidden = false;
    const left = at.x + 14 + tip.offsetWidth > host.clientWidth ? at.x - 14 - tip.offsetWidth : at.x + 14;
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${Math.max(0, at.y - tip.offsetHeight / 2)}px`;
  }

  /* spec: label, height, x {label, log, reverse, domain, format}, y {label, log (true, false, or "auto"), zero (an axis from 0), domain, format},
     series [{name, color, dash, width, kind "line" | "stairs" | "dots" | "marked", faint, x [], y []}],
     bands [{name, from, to}]. Stairs have one x more than y. */
  function drawLine(host, spec, width, height) {
    const { svg, box } = frame(host, spec, width, height);
    const shown = spec.series.filter((line) => line.y.some((value) => value !== null));
    const ys = shown.flatMap((line) => line.y);
    const positive = range(ys, true);
    let log = spec.y.log;
    if (log === "auto") log = positive && Math.min(...ys.filter((value) => value !== null)) > 0 && positive[1] / positive[0] >= 10;
    const xs = spec.x.domain || range(shown.flatMap((line) => line.x), spec.x.log);
    const ends = spec.y.domain || (range(ys, log) && padded(range(ys, log), log));
    if (ends && spec.y.zero && !log) ends[0] = Math.min(0, ends[0]);
    if (!xs || !ends) {
      shape("text", svg, { class: "empty", x: width / 2, y: height / 2 }, spec.empty || "nothing yet");
      return;
    }
    if (xs[0] === xs[1]) { xs[0] -= 0.5; xs[1] += 0.5; }
    const x = scale(xs[0], xs[1], spec.x.log, spec.x.reverse ? box.right : box.left, spec.x.reverse ? box.left : box.right);
    const y = scale(ends[0], ends[1], log, box.bottom, box.top);
    (spec.bands || []).forEach((band, index) => {
      const [from, to] = [x(band.from), x(band.to)].sort((one, other) => one - other).map((at) => Math.min(Math.max(at, box.left), box.right));
      if (to - from < 0.5) return;
      if (index % 2) shape("rect", svg, { class: "band", x: from, y: box.top, width: to - from, height: box.bottom - box.top });
      const room = (to - from) / 6;
      const name = band.name.length <= room ? band.name : room >= 5 ? `${band.name.slice(0, 4)}.` : "";
      shape("text", svg, { class: "band-name", x: (from + to) / 2, y: box.top - 6 }, name).append(Object.assign(document.createElementNS(SVG, "title"), { textContent: band.name }));
    });
    const count = Math.max(2, Math.floor((box.right - box.left) / 60));
    axes(svg, box, x, y, spec.x.log ? logTicks(...xs) : linearTicks(xs[0], xs[1], count),
      log ? logTicks(...ends) : linearTicks(ends[0], ends[1], Math.floor((box.bottom - box.top) / 38)), spec);
    const clip = `clip-${Math.random().toString(36).slice(2)}`;
    shape("rect", shape("clipPath", svg, { id: clip }), { x: box.left, y: box.top - 4, width: box.right - box.left + 4, height: box.bottom - box.top + 6 });
    const lines = shape("g", svg, { "clip-path": `url(#${clip})` });
    for (const line of shown) drawSeries(lines, line, x, y, log);
    hover(host, svg, box, spec, shown, x);
  }

  function drawSeries(parent, line, x, y, log) {
    const visible = (value) => value !== null && (!log || value > 0);
    const look = { class: `series${line.faint ? " faint" : ""}`, "data-name": line.name };
    const style = `stroke:${line.color};${line.width ? `stroke-width:${line.width}` : ""}`;
    if (line.kind !== "dots") {
      let path = "", pen = false;
      line.y.forEach((value, index) => {
        if (!visible(value) || line.x[index] === null) { pen = false; return; }
        const [at, up] = [x(line.x[index]).toFixed(1), y(value).toFixed(1)];
        path += `${pen ? "L" : "M"}${at},${up}`;
        if (line.kind === "stairs") path += `L${x(line.x[index + 1]).toFixed(1)},${up}`;
        pen = true;
      });
      shape("path", parent, { ...look, d: path, style, "stroke-dasharray": line.dash || "none" });
    }
    if (line.kind === "dots" || line.kind === "marked" || line.y.filter(visible).length === 1) {
      line.y.forEach((value, index) => {
        if (visible(value) && line.x[index] !== null) {
          shape("circle", parent, { cx: x(line.x[index]), cy: y(value), r: line.kind === "dots" ? 2.6 : 3.2, style: `fill:${line.color}`, "data-name": line.name });
        }
      });
    }
  }

  function hover(host, svg, box, spec, shown, x) {
    const cross = shape("line", svg, { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
    const tip = element("div", host, { className: "chart-tip", hidden: true });
    const area = shape("rect", svg, { x: box.left, y: box.top, width: Math.max(0, box.right - box.left), height: box.bottom - box.top, fill: "transparent" });
    const told = shown.filter((line) => !line.faint);
    area.addEventListener("pointermove", (event) => {
      const where = svg.getBoundingClientRect();
      const wanted = x.back(event.clientX - where.left);
      const rows = [];
      let title = null;
      for (const line of told) {
        let index = nearest(line.kind === "stairs" ? line.x.slice(0, -1) : line.x, wanted);
        if (line.kind === "stairs") index = Math.max(0, line.x.findIndex((edge, at) => edge <= wanted && wanted < line.x[at + 1]));
        if (index < 0) continue;
        title ??= line.x[index];
        rows.push({ color: line.color, dash: line.dash, name: line.name, value: (spec.y.format || format)(line.y[index], 4) });
      }
      if (title === null) return;
      cross.setAttribute("x1", x(title));
      cross.setAttribute("x2", x(title));
      cross.setAttribute("visibility", "visible");
      const lead = `${spec.x.name || spec.x.label} ${(spec.x.format || format)(title, 4)}`;
      showTip(tip, host, { x: event.clientX - where.left, y: event.clientY - where.top }, { title: lead, rows });
    });
    area.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); tip.hidden = true; });
  }

  function colour(share) {
    const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), left = Math.min(Math.floor(at), VIRIDIS.length - 2);
    const [one, other] = [VIRIDIS[left], VIRIDIS[left + 1]].map((hex) => [1, 3, 5].map((from) => parseInt(hex.slice(from, from + 2), 16)));
    return `rgb(${one.map((value, index) => Math.round(value + (other[index] - value) * (at - left))).join(",")})`;
  }

  /* spec: label, height, x {label, edges}, y {label, edges}, values [column][row], domain, name, bands as above, on y. */
  function drawMap(host, spec, width, height) {
    const { svg, box } = frame(host, spec, width, height);
    const [xs, ys] = [spec.x.edges, spec.y.edges];
    const x = scale(xs[0], xs[xs.length - 1], false, box.left, box.right);
    const y = scale(ys[0], ys[ys.length - 1], false, box.bottom, box.top);
    const value = scale(spec.domain[0], spec.domain[1], true, 0, 1);
    axes(svg, box, x, y, linearTicks(xs[0], xs[xs.length - 1], Math.floor((box.right - box.left) / 60)), linearTicks(ys[0], ys[ys.length - 1], 5), spec);
    const canvas = element("canvas", null);
    const ratio = window.devicePixelRatio || 1, [wide, high] = [box.right - box.left, box.bottom - box.top];
    Object.assign(canvas, { width: wide * ratio, height: high * ratio });
    canvas.style.cssText = `left:${box.left}px;top:${box.top}px;width:${wide}px;height:${high}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    spec.values.forEach((column, at) => column.forEach((number, up) => {
      if (number === null || number <= 0) return;
      pen.fillStyle = colour(value(number));
      const [left, top] = [x(xs[at]) - box.left, y(ys[up + 1]) - box.top];
      pen.fillRect(left, top, x(xs[at + 1]) - x(xs[at]) + 0.5, y(ys[up]) - y(ys[up + 1]) + 0.5);
    }));
    host.append(canvas);
    const over = shape("svg", host, { viewBox: `0 0 ${width} ${height}`, height, style: "position:absolute;inset:0" });
    for (const band of spec.bands || []) {
      if (band.to < ys[ys.length - 1]) shape("line", over, { class: "edge", x1: box.left, x2: box.right, y1: y(band.to), y2: y(band.to) });
      shape("text", over, { class: "edge-name", x: box.right - 6, y: (y(band.from) + y(band.to)) / 2 + 4 }, band.name);
    }
    const cell = shape("rect", over, { class: "cell", visibility: "hidden" });
    const tip = element("div", host, { className: "chart-tip", hidden: true });
    const area = shape("rect", over, { x: box.left, y: box.top, width: wide, height: high, fill: "transparent" });
    const find = (edges, wanted) => Math.min(Math.max(edges.findIndex((edge, index) => edge <= wanted && wanted < edges[index + 1]), 0), edges.length - 2);
    area.addEventListener("pointermove", (event) => {
      const where = over.getBoundingClientRect();
      const [at, up] = [find(xs, x.back(event.clientX - where.left)), find(ys, y.back(event.clientY - where.top))];
      const corner = { x: x(xs[at]), y: y(ys[up + 1]) };
      for (const [key, length] of Object.entries({ ...corner, width: x(xs[at + 1]) - corner.x, height: y(ys[up]) - corner.y, visibility: "visible" })) cell.setAttribute(key, length);
      const rows = [{ name: spec.name, value: format(spec.values[at][up], 4) }];
      const title = `${spec.x.name} ${format(xs[at + 1], 6)}, ${spec.y.name} ${ys[up]}–${ys[up + 1] - 1}`;
      showTip(tip, host, { x: event.clientX - where.left, y: event.clientY - where.top }, { title, rows });
    });
    area.addEventListener("pointerleave", () => { cell.setAttribute("visibility", "hidden"); tip.hidden = true; });
  }

  function bar(host, [low, high], name) {
    const made = element("div", host, { className: "chart-bar" });
    element("span", made, {}, `${name} ${format(low)}`);
    element("i", made).style.background = `linear-gradient(90deg,${VIRIDIS.join(",")})`;
    element("span", made, {}, format(high));
  }

  return {
    element,
    format,
    range,
    bar,
    line: (host, spec) => mounted(host, drawLine, spec),
    map: (host, spec) => mounted(host, drawMap, spec),
  };
})();
