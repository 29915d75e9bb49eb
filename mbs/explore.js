// Draws an explorer: panels over one photo that share a pick, a legend and a filter. Every number shown comes from the state in the kernel.

const bytes = (v) => (v instanceof DataView ? new Uint8Array(v.buffer, v.byteOffset, v.byteLength) : new Uint8Array(v));

async function inflate(v) {
  const stream = new DecompressionStream("deflate"), writer = stream.writable.getWriter(), reader = stream.readable.getReader(), parts = [];
  writer.write(bytes(v)); writer.close();
  for (let part = await reader.read(); !part.done; part = await reader.read()) parts.push(part.value);
  const whole = new Uint8Array(parts.reduce((n, part) => n + part.length, 0));
  parts.reduce((at, part) => { whole.set(part, at); return at + part.length; }, 0);
  return whole;
}

function same(a, b) {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

async function pixels(encoded, width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(await createImageBitmap(new Blob([bytes(encoded)])), 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

function element(tag, parent, attributes = {}, text = "") {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text) e.textContent = text;
  parent.append(e);
  return e;
}

// Labels over the photo; the same arithmetic as `paint` in mbs.explore.
function paintLabels(out, photo, labels, [height, width], style, alpha, hidden, dimmed) {
  const colours = bytes(style.colours), part = new Float32Array(1024), shown = new Int16Array(256), hatched = new Uint8Array(256);
  for (let l = 0; l < 256; l++) {
    const a = hidden.has(l) ? 0 : (alpha * colours[4 * l + 3]) / 255;
    shown[l] = hidden.has(l) ? -1 : l;
    for (let j = 0; j < 3; j++) part[4 * l + j] = a * colours[4 * l + j];
    part[4 * l + 3] = 1 - a;
  }
  for (const l of style.hatched) hatched[l] = 1;
  const period = Math.max(4, Math.floor(Math.min(width, height) / 24)), line = Math.max(1, Math.floor(period / 4)), faint = 1 - 0.9 * alpha;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const l = labels[i], j = 4 * i, s = shown[l];
      let keep = part[4 * l + 3], r = part[4 * l], g = part[4 * l + 1], b = part[4 * l + 2];
      if (dimmed && dimmed[i]) { keep = faint; r = g = b = 0; }
      else if (s >= 0 && ((hatched[l] && (x + y) % period < line)
               || (style.outline && ((x + 1 < width && shown[labels[i + 1]] !== s) || (y + 1 < height && shown[labels[i + width]] !== s))))) {
        keep = 1 - alpha; r = g = b = 255 * alpha;
      }
      out[j] = photo[j] * keep + r; out[j + 1] = photo[j + 1] * keep + g; out[j + 2] = photo[j + 2] * keep + b; out[j + 3] = 255;
    }
  }
}

// Numbers or colours on the patch grid; `cell` shown pixels a patch.
function paintPatches(out, values, [height, width], columns, cell, ramp) {
  const column = Int32Array.from({ length: width }, (_, x) => Math.floor(x / cell));
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor(y / cell) * columns;
    for (let x = 0; x < width; x++, i++) {
      const at = row + column[x], j = 4 * i;
      for (let c = 0; c < 3; c++) out[j + c] = ramp ? ramp[3 * values[at] + c] : values[3 * at + c];
      out[j + 3] = 255;
    }
  }
}

export default {
  async render({ model, el }) {
    const root = element("div", el, { class: "mbs-explore", role: "group", "data-lm-suppress-shortcuts": "true" });
    const heading = element("div", root, { class: "mbs-heading" });
    const body = element("div", root, { class: "mbs-body" });
    const main = element("div", body, { class: "mbs-main" }), side = element("div", body, { class: "mbs-side" });
    const grid = element("div", main, { class: "mbs-panels" });
    const tip = element("div", main, { class: "mbs-tip" }, "\u00a0");
    const chips = element("div", main, { class: "mbs-chips", role: "group", "aria-label": "classes and groups shown" });
    const note = element("div", main, { class: "mbs-note" });
    const help = element("div", main, { class: "mbs-note", hidden: "" });
    const table = element("div", side, { class: "mbs-tables" }), chart = element("div", side, { class: "mbs-chart" }), card = element("div", side, { class: "mbs-card", role: "status", "aria-live": "polite" });

    let picture = null, photo = null, fixed = {}, labels = null, moving = {}, pointed = {}, known = {}, panels = new Map(), colours = true, waiting = 0, turn = { picture: 0, labels: 0, point: 0 };
    const maps = () => ({ ...fixed, ...moving, ...pointed });
    const get = (k) => model.get(k);
    const say = (k, v) => { model.set(k, v); model.save_changes(); };

    async function unpack(from) {
      const entries = Object.entries(from.maps || {}).map(async ([k, v]) => {
        if (!known[k] || !same(known[k].packed, bytes(v))) known[k] = { packed: bytes(v), values: await inflate(v) }; // what is as it was is not unpacked and painted again
        return [k, known[k].values];
      });
      return Object.fromEntries(await Promise.all(entries));
    }
    async function load(part) { // of a burst of changes only the last is drawn
      const mine = ++turn[part], from = get(part), fresh = await unpack(from);
      if (part === "picture") {
        const shown = await pixels(from.photo, from.size[1], from.size[0]);
        if (mine !== turn[part]) return;
        [picture, photo, fixed] = [from, shown, fresh];
      } else {
        if (mine !== turn[part]) return;
        if (part === "labels") [labels, moving] = [from, fresh]; else pointed = fresh;
      }
      ask();
    }
    function ask() { if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; draw(); }); }

    function layout(specs) { // a canvas a panel, kept as long as the panels are the same ones
      const keys = specs.map((p) => p.key).join();
      if (grid.dataset.keys !== keys) { grid.replaceChildren(); panels = new Map(); grid.dataset.keys = keys; }
      for (const spec of specs) {
        let p = panels.get(spec.key);
        if (!p) {
          const box = element("figure", grid, { class: "mbs-panel" }), title = element("figcaption", box), frame = element("div", box, { class: "mbs-frame" });
          const canvas = element("canvas", frame, { tabindex: "0", role: "img" }), mark = element("div", frame, { class: "mbs-mark" }), bar = element("div", box, { class: "mbs-bar" });
          p = { title, canvas, mark, bar, frame };
          panels.set(spec.key, p);
          canvas.addEventListener("mousemove", (e) => { tip.textContent = under(at(canvas, e)); });
          canvas.addEventListener("mouseleave", () => { tip.textContent = "\u00a0"; });
          canvas.addEventListener("click", (e) => say("pick", at(canvas, e).map((v) => v * picture.reduced)));
          canvas.addEventListener("keydown", (e) => key(e));
        }
        p.spec = spec;
        if (p.title.textContent !== spec.title) p.title.textContent = spec.title;
      }
    }
    function at(canvas, e) {
      const r = canvas.getBoundingClientRect(), [h, w] = picture.size;
      return [Math.min(h - 1, Math.max(0, Math.floor(((e.clientY - r.top) * h) / r.height))), Math.min(w - 1, Math.max(0, Math.floor(((e.clientX - r.left) * w) / r.width)))];
    }
    function under([y, x]) { // what the panels say about a pixel, without asking the kernel
      const all = maps(), words = [];
      for (const { spec } of panels.values()) {
        const values = all[spec.key];
        if (!values || spec.kind === "rgb") continue;
        if (spec.kind === "labels") words.push(`${spec.short}: ${picture.styles[spec.style].names[values[y * picture.size[1] + x]]}`);
        else words.push(`${spec.short}: ${number(spec, values[Math.floor(y / spec.cell) * spec.columns + Math.floor(x / spec.cell)])}`);
      }
      return `(${y * picture.reduced}, ${x * picture.reduced})  ${words.join(" · ")}`;
    }
    const number = (spec, v) => { const [low, high] = range(spec); return (low + (v / 255) * (high - low)).toPrecision(2); };
    const range = (spec) => (get("point").ranges || {})[spec.key] || spec.range;

    function draw() {
      if (!picture || !labels || picture.of !== labels.of) return; // the other part is still on its way
      const all = maps();
      const [h, w] = picture.size;
      root.classList.toggle("mbs-wide", picture.wide);
      layout(labels.panels);
      const alpha = colours ? get("alpha") : 0, hidden = new Set(get("hidden")), none = new Set(), filter = new Set(get("flow_filter"));
      const fits = all.flow && all.flow.length === h * w;
      let dimmed = null;
      if (filter.size && fits) { dimmed = new Uint8Array(h * w); for (let i = 0; i < h * w; i++) dimmed[i] = filter.has(all.flow[i]) ? 0 : 1; }
      for (const p of panels.values()) {
        const { spec, canvas } = p, values = all[spec.key];
        if (!values || (spec.kind === "labels" && values.length !== h * w)) continue; // its picture is still on the way
        const paint = spec.kind === "labels" ? [alpha, [...hidden].join(), [...filter].join(), dimmed && all.flow] : [];
        const from = [values, picture, photo, spec.kind, spec.style, spec.columns, spec.cell, ...paint];
        if (!p.from || from.some((v, k) => v !== p.from[k])) { // anything else is painted as it should be already
          if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
          const context = canvas.getContext("2d", { willReadFrequently: true }), out = context.createImageData(w, h);
          if (spec.kind === "labels") paintLabels(out.data, photo, values, [h, w], picture.styles[spec.style], alpha, spec.style === "class" || spec.style === "group" ? hidden : none, dimmed);
          else paintPatches(out.data, values, [h, w], spec.columns, spec.cell, spec.kind === "score" ? bytes(picture.ramp) : null);
          context.putImageData(out, 0, 0);
          canvas.dataset.version = +(canvas.dataset.version || 0) + 1;
          p.from = from;
        }
        canvas.setAttribute("aria-label", `${spec.title}: ${spec.about}`);
        bar(p);
      }
      heading.textContent = `${get("title")}, ${picture.of}`;
      note.textContent = picture.note; help.textContent = picture.keys;
      marks(); legend(hidden); tables(labels.tables, filter); curve(); pixel();
      root.dataset.drawn = labels.stamp;
    }
    function bar({ bar, spec }) {
      bar.classList.toggle("mbs-scored", spec.kind === "score");
      if (spec.kind !== "score") return;
      const [low, high] = range(spec), ramp = bytes(picture.ramp);
      const stops = [0, 64, 128, 192, 255].map((i) => `rgb(${ramp[3 * i]},${ramp[3 * i + 1]},${ramp[3 * i + 2]})`).join();
      bar.style.setProperty("--ramp", `linear-gradient(to right, ${stops})`);
      bar.dataset.low = (+low).toPrecision(2); bar.dataset.high = (+high).toPrecision(2);
    }
    function marks() {
      if (!picture) return;
      const [y, x] = get("pick").map((v) => Math.floor(v / picture.reduced)), cell = Math.max(1, picture.patch / picture.reduced), [h, w] = picture.size;
      const top = Math.floor(y / cell) * cell, left = Math.floor(x / cell) * cell;
      for (const { mark } of panels.values()) {
        Object.assign(mark.style, { top: `${(100 * top) / h}%`, left: `${(100 * left) / w}%`, height: `${(100 * Math.min(cell, h - top)) / h}%`, width: `${(100 * Math.min(cell, w - left)) / w}%` });
      }
    }
    function toggle(k, ids) {
      const now = new Set(get(k)), all = ids.every((i) => now.has(i));
      ids.forEach((i) => (all ? now.delete(i) : now.add(i)));
      say(k, [...now].sort((a, b) => a - b));
      ask();
    }
    function refill(box, wanted, build) { // rebuild only what changed, so that focus stays
      const stamp = JSON.stringify(wanted);
      if (box.dataset.stamp !== stamp) { const place = [...box.querySelectorAll("button")].indexOf(document.activeElement); box.replaceChildren(); build(); box.querySelectorAll("button")[place]?.focus(); box.dataset.stamp = stamp; }
    }
    function swatch(parent, colour, hatched) { element("span", parent, { class: hatched ? "mbs-swatch mbs-hatched" : "mbs-swatch", style: `background-color:rgb(${colour})` }); }
    function legend(hidden) {
      refill(chips, [picture.groups, picture.chips, [...hidden]], () => {
        for (const [i, [name, ids]] of picture.groups.entries()) chip(name, ids, null, `${i + 1}`);
        for (const [id, name, colour] of picture.chips) chip(name, [id], colour, "");
      });
      function chip(name, ids, colour, shortcut) {
        const off = ids.length > 0 && ids.every((i) => hidden.has(i));
        const b = element("button", chips, { type: "button", "aria-pressed": String(!off), title: `show or hide ${name}` + (shortcut ? ` (key ${shortcut})` : ""), class: colour ? "mbs-chip" : "mbs-chip mbs-group" });
        if (colour) swatch(b, colour, ids[0] === 255);
        b.append(name);
        b.addEventListener("click", () => toggle("hidden", ids));
      }
    }
    function tables(parts, filter) {
      refill(table, [parts, [...filter]], () => {
        for (const part of parts) {
          const t = element("table", table), caption = element("caption", t, {}, part.title);
          for (const row of part.rows) {
            const tr = element("tr", t, filter.size && part.filter && !filter.has(row.code) ? { class: "mbs-off" } : {}), cell = element("td", tr);
            const holder = part.filter ? element("button", cell, { type: "button", "aria-pressed": String(filter.has(row.code)), title: "show these pixels alone" }) : cell;
            swatch(holder, row.colour, row.hatched);
            holder.append(row.name);
            if (part.filter) holder.addEventListener("click", () => toggle("flow_filter", [row.code]));
            element("td", tr, { class: "mbs-number" }, row.count.toLocaleString("en"));
            element("td", tr, { class: "mbs-number" }, `${(100 * row.share).toFixed(1)} %`);
          }
          for (const line of part.lines || []) element("div", table, { class: "mbs-line" }, line);
        }
      });
    }
    function curve() {
      const c = picture.curve, tau = get("tau");
      if (!c) { chart.replaceChildren(); return; }
      const w = 270, h = 120, x = (v) => 24 + v * (w - 32), y = (v) => 6 + (1 - v) * (h - 24);
      const path = (values) => { let d = "", pen = false; values.forEach((v, k) => { if (v === null) { pen = false; return; } d += `${pen ? "L" : "M"}${x(k / (values.length - 1)).toFixed(1)} ${y(v).toFixed(1)}`; pen = true; }); return d; };
      const line = (k) => `<path d="${path(c.lines[k].values)}" fill="none" stroke="${c.lines[k].colour}" stroke-width="1.8" stroke-dasharray="${c.lines[k].dash}"/>`;
      const ticks = [0, 0.5, 1].map((v) => `<text x="20" y="${y(v) + 3}" text-anchor="end">${v}</text><text x="${x(v)}" y="${h - 6}" text-anchor="middle">${v}</text><path d="M${x(0)} ${y(v)}H${x(1)}" class="mbs-rule"/>`).join("");
      const own = `<path d="M${x(c.own)} ${y(0)}V${y(1)}" class="mbs-own"/>`, now = `<path d="M${x(tau)} ${y(0)}V${y(1)}" class="mbs-now"/>`;
      const said = c.lines.map((l) => { const v = l.values[Math.round(tau * 100)]; return `${l.name} ${v === null ? "undefined" : v.toFixed(2)}`; }).join(", ");
      const keys = c.lines.map((l) => `<span><svg width="22" height="8" aria-hidden="true"><path d="M0 4H22" stroke="${l.colour}" stroke-width="2" stroke-dasharray="${l.dash}"/></svg> ${l.name}</span>`).join("");
      chart.innerHTML = `<div class="mbs-caption">against τ (solid: now, dashed: the run's)</div><svg class="mbs-curve" viewBox="0 0 ${w} ${h}" role="img" aria-label="at τ ${tau.toFixed(2)}: ${said}">${ticks}${own}${c.lines.map((_, k) => line(k)).join("")}${now}</svg><div class="mbs-keys">${keys}</div>`;
    }
    function pixel() {
      const p = get("point"), tau = get("tau");
      refill(card, [p.lines, p.bars, tau], () => {
        if (!p.lines) return;
        for (const [i, l] of p.lines.entries()) element("div", card, { class: i ? "mbs-line" : "mbs-caption" }, l);
        for (const b of p.bars || []) {
          const row = element("div", card, { class: "mbs-bars" });
          element("span", row, { class: "mbs-name" }, b.name);
          const tracks = element("span", row, { class: "mbs-tracks", style: `--tau:${100 * tau}%` });
          for (const kind of ["old", "new"]) element("span", tracks, { class: `mbs-${kind}`, style: `width:${100 * (b[kind] ?? 0)}%` });
          element("span", row, { class: "mbs-number" }, `${b.old === null ? "–" : b.old.toFixed(2)} → ${b.new.toFixed(2)}`);
        }
      });
    }
    function key(e) {
      if (e.ctrlKey || e.altKey || e.metaKey) return;
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key], size = picture.size.map((n) => n * picture.reduced);
      if (step) say("pick", get("pick").map((v, i) => Math.min(picture.full[i] - 1, Math.max(0, v + step[i] * picture.patch))));
      else if (e.key === "n" || e.key === "p") model.send({ move: e.key === "n" ? 1 : -1 });
      else if (e.key === "[" || e.key === "]") say("tau", Math.min(1, Math.max(0, Math.round(100 * get("tau") + (e.key === "]" ? 1 : -1)) / 100)));
      else if (e.key === "m") { colours = !colours; ask(); }
      else if (e.key === "?") help.hidden = !help.hidden;
      else if ("1234".includes(e.key) && picture.groups[e.key - 1]) toggle("hidden", picture.groups[e.key - 1][1]);
      else return;
      e.preventDefault(); e.stopPropagation();
    }
    for (const part of ["picture", "labels", "point"]) model.on(`change:${part}`, () => load(part));
    for (const k of ["alpha", "hidden", "flow_filter", "title"]) model.on(`change:${k}`, ask);
    model.on("change:pick", marks);
    await Promise.all(["picture", "labels", "point"].map(load));
  },
};
