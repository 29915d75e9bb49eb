// The view of an explorer: panels over one photo that share a picked pixel, a legend and a filter.
//
// A model holds three parts, described in mbs.explore.page: `picture` (photo, styles, names), `panels` (titles, maps,
// tables) and `pixel` (what is known about the picked pixel). Every number comes from the kernel; the script only draws.

const VOID = 255;
const PARTS = ["picture", "panels", "pixel"];
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const WHOLE = { scale: 1, x: 0, y: 0 };
const MAX_ZOOM = 32;
const ZOOM_STEP = 1.5; // of a key or button
const LEAST_DRAG = 4; // CSS pixels; a shorter one is a click
const SPACE = "\u00a0"; // keeps an empty line as high as a full one

// ---- bytes ----

function toBytes(value) {
  return value instanceof DataView
    ? new Uint8Array(value.buffer, value.byteOffset, value.byteLength)
    : new Uint8Array(value);
}

async function unpack(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function areEqual(a, b) {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

async function decodePhoto(file, [height, width]) {
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(await createImageBitmap(new Blob([toBytes(file)])), 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- elements ----

function addElement(tag, parent, attributes = {}, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

function addSwatch(parent, colour, isHatched) {
  const classes = isHatched ? "mbs-swatch mbs-hatched" : "mbs-swatch";
  addElement("span", parent, { class: classes, style: `background-color:rgb(${colour})` });
}

// Rebuild a box only if its content changed; the button that had the focus keeps it.
function refill(box, content, build) {
  const text = JSON.stringify(content);
  if (box.dataset.content === text) return;
  const focused = [...box.querySelectorAll("button")].indexOf(document.activeElement);
  box.replaceChildren();
  build();
  box.querySelectorAll("button")[focused]?.focus();
  box.dataset.content = text;
}

// ---- pixels ----

// For each label: colour × opacity, the share of the photo that stays, and the label itself or -1 where it is hidden.
function mixColours(style, alpha, hidden) {
  const colours = toBytes(style.colours);
  const added = new Float32Array(4 * 256);
  const shown = new Int16Array(256);
  for (let label = 0; label < 256; label++) {
    const strength = hidden.has(label) ? 0 : (alpha * colours[4 * label + 3]) / 255;
    for (let c = 0; c < 3; c++) added[4 * label + c] = strength * colours[4 * label + c];
    added[4 * label + 3] = 1 - strength;
    shown[label] = hidden.has(label) ? -1 : label;
  }
  return { added, shown };
}

// Paint labels over the photo, with the arithmetic of `paint` in mbs.explore.paint.
// Most pixels have the label of their neighbours, so colours are looked up where the label changes. With the labels
// that `out` shows already, `shownLabels`, only pixels that change, or whose outline may change, are painted.
function paintLabels(out, photo, labels, shownLabels, [height, width], style, alpha, hidden, darkened) {
  const { added, shown } = mixColours(style, alpha, hidden);
  const isHatched = new Uint8Array(256);
  for (const label of style.hatched) isHatched[label] = 1;
  const period = Math.max(4, Math.floor(Math.min(width, height) / 24));
  const line = Math.max(1, Math.floor(period / 4));
  const dark = 1 - (230 / 255) * alpha; // the strength of DARKENED
  const white = 255 * alpha;
  const hasOutline = style.has_outline;
  let label = -1;
  let [red, green, blue, kept] = [0, 0, 0, 1]; // of the label
  for (let y = 0, i = 0; y < height; y++) {
    const below = y + 1 < height ? width : 0;
    for (let x = 0; x < width; x++, i++) {
      if (
        shownLabels &&
        shownLabels[i] === labels[i] &&
        shownLabels[i + 1] === labels[i + 1] &&
        shownLabels[i + below] === labels[i + below]
      )
        continue;
      const j = 4 * i;
      out[j + 3] = 255;
      if (darkened && darkened[i]) {
        out[j] = photo[j] * dark;
        out[j + 1] = photo[j + 1] * dark;
        out[j + 2] = photo[j + 2] * dark;
        continue;
      }
      if (labels[i] !== label) {
        label = labels[i];
        red = added[4 * label];
        green = added[4 * label + 1];
        blue = added[4 * label + 2];
        kept = added[4 * label + 3];
      }
      if (shown[label] >= 0) {
        const right = x + 1 < width ? labels[i + 1] : label;
        const under = labels[i + below];
        const isEdge =
          hasOutline &&
          ((right !== label && shown[right] !== label) || (under !== label && shown[under] !== label));
        if (isEdge || (isHatched[label] && (x + y) % period < line)) {
          out[j] = photo[j] * (1 - alpha) + white;
          out[j + 1] = photo[j + 1] * (1 - alpha) + white;
          out[j + 2] = photo[j + 2] * (1 - alpha) + white;
          continue;
        }
      }
      out[j] = photo[j] * kept + red;
      out[j + 1] = photo[j + 1] * kept + green;
      out[j + 2] = photo[j + 2] * kept + blue;
    }
  }
}

// Paint numbers (with a colour ramp) or colours (without) on a grid of patches; `cell` is the side of a patch.
function paintPatches(out, values, [height, width], columns, cell, ramp) {
  const columnOf = Int32Array.from({ length: width }, (_, x) => Math.floor(x / cell));
  for (let y = 0, i = 0, before = -1; y < height; y++) {
    const row = Math.floor(y / cell);
    if (row === before) {
      out.copyWithin(4 * i, 4 * (i - width), 4 * i); // the line above
      i += width;
      continue;
    }
    before = row;
    for (let x = 0; x < width; x++, i++) {
      const patch = row * columns + columnOf[x];
      for (let c = 0; c < 3; c++) out[4 * i + c] = ramp ? ramp[3 * values[patch] + c] : values[3 * patch + c];
      out[4 * i + 3] = 255;
    }
  }
}

// ---- the curve over τ ----

const CURVE = { width: 270, height: 120 };
const curveX = (value) => 24 + value * (CURVE.width - 32);
const curveY = (value) => 6 + (1 - value) * (CURVE.height - 24);

function drawPath(values) {
  let path = "";
  let isDown = false; // the pen is lifted where a value does not exist
  values.forEach((value, k) => {
    if (value !== null) {
      const x = curveX(k / (values.length - 1)).toFixed(1);
      path += `${isDown ? "L" : "M"}${x} ${curveY(value).toFixed(1)}`;
    }
    isDown = value !== null;
  });
  return path;
}

function drawCurve({ lines, run_tau }, tau) {
  const vertical = (value, name) => `<path d="M${curveX(value)} ${curveY(0)}V${curveY(1)}" class="${name}"/>`;
  const ticks = [0, 0.5, 1].map(
    (value) =>
      `<text x="20" y="${curveY(value) + 3}" text-anchor="end">${value}</text>` +
      `<text x="${curveX(value)}" y="${CURVE.height - 6}" text-anchor="middle">${value}</text>` +
      `<path d="M${curveX(0)} ${curveY(value)}H${curveX(1)}" class="mbs-rule"/>`,
  );
  const paths = lines.map(
    ({ values, colour, dash }) =>
      `<path d="${drawPath(values)}" fill="none" stroke="${colour}" stroke-width="1.8" stroke-dasharray="${dash}"/>`,
  );
  const keys = lines.map(
    ({ name, colour, dash }) =>
      `<span><svg width="22" height="8" aria-hidden="true"><path d="M0 4H22" stroke="${colour}" stroke-width="2" ` +
      `stroke-dasharray="${dash}"/></svg> ${name}</span>`,
  );
  const values = lines.map(({ name, values }) => {
    const value = values[Math.round(100 * tau)];
    return `${name} ${value === null ? "undefined" : value.toFixed(2)}`;
  });
  return (
    `<div class="mbs-caption">Over τ (solid line: chosen τ, dashed line: τ of the run)</div>` +
    `<svg class="mbs-curve" viewBox="0 0 ${CURVE.width} ${CURVE.height}" role="img" ` +
    `aria-label="at τ ${tau.toFixed(2)}: ${values.join(", ")}">` +
    ticks.join("") +
    vertical(run_tau, "mbs-run-tau") +
    paths.join("") +
    vertical(tau, "mbs-tau") +
    `</svg><div class="mbs-keys">${keys.join("")}</div>`
  );
}

// ---- the view ----

class View {
  constructor(model, parent) {
    this.model = model;
    this.parts = {}; // as loaded; `picture` and `panels` may belong to different moments for a while
    this.maps = {}; // unpacked, by part and key
    this.unpacked = {}; // the last packed and unpacked bytes of each key
    this.turn = { picture: 0, panels: 0, pixel: 0 };
    this.photo = null;
    this.shownPicture = null; // the part that was drawn last
    this.canvases = new Map(); // panel key → its elements
    this.showsColours = true;
    this.frame = 0; // of the animation; 0: none is waiting
    this.build(parent);
  }

  build(parent) {
    this.root = addElement("div", parent, {
      class: "mbs-explore",
      role: "group",
      "data-lm-suppress-shortcuts": "true",
    });
    this.heading = addElement("div", this.root, { class: "mbs-heading" });
    const body = addElement("div", this.root, { class: "mbs-body" });
    const main = addElement("div", body, { class: "mbs-main" });
    this.grid = addElement("div", main, { class: "mbs-panels" });
    this.tip = addElement("div", main, { class: "mbs-tip" }, SPACE);
    this.addZoomButtons(main);
    this.legend = addElement("div", main, {
      class: "mbs-chips",
      role: "group",
      "aria-label": "show or hide classes and groups",
    });
    this.note = addElement("div", main, { class: "mbs-note" });
    this.help = addElement("div", main, { class: "mbs-note", hidden: "" });
    const side = addElement("div", body, { class: "mbs-side" });
    this.tables = addElement("div", side, { class: "mbs-tables" });
    this.chart = addElement("div", side, { class: "mbs-chart" });
    this.card = addElement("div", side, { class: "mbs-card", role: "status", "aria-live": "polite" });
  }

  addZoomButtons(parent) {
    const bar = addElement("div", parent, { class: "mbs-zoom-bar", role: "group", "aria-label": "zoom" });
    const addButton = (text, title, press) => {
      addElement("button", bar, { type: "button", title, "aria-label": title }, text).addEventListener("click", press);
    };
    addButton("−", "zoom out (key −)", () => this.zoomAtPick(1 / ZOOM_STEP));
    addButton("+", "zoom in at the picked pixel (key +)", () => this.zoomAtPick(ZOOM_STEP));
    addButton("⤢", "show the whole picture (key 0, or double-click)", () => this.setZoom(WHOLE));
  }

  get(name) {
    return this.model.get(name);
  }

  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  async start() {
    for (const part of PARTS) this.model.on(`change:${part}`, () => this.load(part));
    const redraw = () => this.redraw();
    for (const name of ["alpha", "hidden", "flow_filter", "title"]) this.model.on(`change:${name}`, redraw);
    this.model.on("change:pick", () => this.drawMarks());
    new ResizeObserver(() => this.chooseSmoothing()).observe(this.grid);
    this.addDrop();
    await Promise.all(PARTS.map((part) => this.load(part)));
  }

  // -- loading

  // Unpack the maps of a part; one that did not change is neither unpacked nor painted again.
  async unpackMaps(content) {
    const maps = {};
    const unpackOne = async ([key, value]) => {
      const packed = toBytes(value);
      if (!this.unpacked[key] || !areEqual(this.unpacked[key].packed, packed))
        this.unpacked[key] = { packed, values: await unpack(packed) };
      maps[key] = this.unpacked[key].values;
    };
    await Promise.all(Object.entries(content.maps || {}).map(unpackOne));
    return maps;
  }

  // Load a part from the model; of a burst of changes only the last is drawn.
  async load(part) {
    const turn = ++this.turn[part];
    const content = this.get(part);
    const maps = await this.unpackMaps(content);
    const photo = part === "picture" ? await decodePhoto(content.photo, content.size) : this.photo;
    if (turn !== this.turn[part]) return;
    this.parts[part] = content;
    this.maps[part] = maps;
    if (part === "picture") this.photo = photo;
    this.redraw();
  }

  getMaps() {
    return { ...this.maps.picture, ...this.maps.panels, ...this.maps.pixel };
  }

  // -- drawing

  redraw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  draw() {
    const { picture, panels } = this.parts;
    if (!picture || !panels || picture.moment !== panels.moment) return; // the other part has not arrived yet
    this.root.classList.toggle("mbs-wide", picture.is_wide);
    this.arrangePanels(panels.panels);
    this.paintPanels();
    this.heading.textContent = `${this.get("title")}, ${picture.moment}`;
    this.legend.dataset.title = this.get("title");
    this.note.textContent = picture.note;
    this.help.textContent = picture.help;
    this.drawMarks();
    this.drawLegend();
    this.drawTables();
    this.drawChart();
    this.drawCard();
    if (picture !== this.shownPicture) this.chooseSmoothing(); // reads the layout, which takes its time
    this.shownPicture = picture;
    this.root.dataset.drawn = panels.drawn;
  }

  // Make a canvas for every panel; canvases stay as long as the panels are the same.
  arrangePanels(panels) {
    const keys = panels.map(({ key }) => key).join();
    if (this.grid.dataset.keys !== keys) {
      this.grid.replaceChildren();
      this.canvases = new Map(panels.map(({ key }) => [key, this.addPanel()]));
      this.grid.dataset.keys = keys;
    }
    for (const panel of panels) {
      const elements = this.canvases.get(panel.key);
      elements.panel = panel;
      if (elements.title.textContent !== panel.title) elements.title.textContent = panel.title;
    }
  }

  addPanel() {
    const box = addElement("figure", this.grid, { class: "mbs-panel" });
    const title = addElement("figcaption", box);
    const frame = addElement("div", box, { class: "mbs-frame" });
    const zoomed = addElement("div", frame, { class: "mbs-zoomed" });
    const canvas = addElement("canvas", zoomed, { tabindex: "0", role: "img" });
    const mark = addElement("div", zoomed, { class: "mbs-mark" });
    const bar = addElement("div", box, { class: "mbs-bar" });
    canvas.addEventListener("mousemove", (event) => {
      this.tip.textContent = this.describePixel(this.findPixel(canvas, event));
    });
    canvas.addEventListener("mouseleave", () => {
      this.tip.textContent = SPACE;
    });
    this.addZoom(frame, canvas);
    canvas.addEventListener("click", (event) => {
      if (this.isDragged) return;
      const pixel = this.findPixel(canvas, event);
      this.set("pick", pixel.map((value) => value * this.parts.picture.thinning));
    });
    canvas.addEventListener("keydown", (event) => this.handleKey(event));
    return { title, canvas, mark, bar };
  }

  // Mark the pixels that the flow filter leaves out; null without a filter.
  findDarkened(flow, filter) {
    const [height, width] = this.parts.picture.size;
    if (!filter.size || !flow || flow.length !== height * width) return null;
    return flow.map((code) => (filter.has(code) ? 0 : 1));
  }

  paintPanels() {
    const maps = this.getMaps();
    const [height, width] = this.parts.picture.size;
    const filter = new Set(this.get("flow_filter"));
    const choice = {
      alpha: this.showsColours ? this.get("alpha") : 0,
      hidden: new Set(this.get("hidden")),
      darkened: this.findDarkened(maps.flow, filter),
    };
    const choiceKeys = [choice.alpha, [...choice.hidden].join(), [...filter].join(), choice.darkened && maps.flow];
    for (const elements of this.canvases.values()) {
      const { panel, canvas } = elements;
      const values = maps[panel.key];
      const isLabels = panel.kind === "labels";
      if (!values || (isLabels && values.length !== height * width)) continue; // its map has not arrived yet
      const { picture } = this.parts;
      const inputs = [picture, this.photo, panel.kind, panel.style, panel.columns, panel.cell];
      if (isLabels) inputs.push(...choiceKeys);
      const isSame = elements.inputs?.every((input, k) => input === inputs[k]);
      if (!isSame || values !== elements.values) {
        this.paintPanel(elements, values, isSame ? elements.values : null, choice);
        Object.assign(elements, { inputs, values });
      }
      canvas.setAttribute("aria-label", `${panel.title}: ${panel.about}`);
      this.drawBar(elements);
    }
  }

  // Paint a panel; where only its values change, `shownValues` are those that it shows.
  paintPanel(elements, values, shownValues, { alpha, hidden, darkened }) {
    const { panel, canvas } = elements;
    const { picture } = this.parts;
    const [height, width] = picture.size;
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const context = canvas.getContext("2d", { willReadFrequently: true });
    if (!shownValues) elements.image = context.createImageData(width, height);
    const { image } = elements;
    if (panel.kind === "labels") {
      const isOfClasses = panel.style === "class" || panel.style === "group"; // codes of fate and flow are no classes
      const style = picture.styles[panel.style];
      const off = isOfClasses ? hidden : new Set();
      paintLabels(image.data, this.photo, values, shownValues, picture.size, style, alpha, off, darkened);
    } else {
      const ramp = panel.kind === "numbers" ? toBytes(picture.ramp) : null;
      paintPatches(image.data, values, picture.size, panel.columns, panel.cell, ramp);
    }
    context.putImageData(image, 0, 0);
    canvas.dataset.version = +(canvas.dataset.version || 0) + 1;
  }

  getRange(panel) {
    return (this.get("pixel").ranges || {})[panel.key] || panel.range;
  }

  // Draw the colour bar of a panel of numbers.
  drawBar({ bar, panel }) {
    const isNumbers = panel.kind === "numbers";
    bar.classList.toggle("mbs-scored", isNumbers);
    if (!isNumbers) return;
    const [low, high] = this.getRange(panel);
    const ramp = toBytes(this.parts.picture.ramp);
    const stops = [0, 64, 128, 192, 255].map((i) => `rgb(${ramp[3 * i]},${ramp[3 * i + 1]},${ramp[3 * i + 2]})`);
    bar.style.setProperty("--ramp", `linear-gradient(to right, ${stops.join()})`);
    bar.dataset.low = (+low).toPrecision(2);
    bar.dataset.high = (+high).toPrecision(2);
  }

  // Mark the picked patch on every panel.
  drawMarks() {
    const { picture } = this.parts;
    if (!picture) return;
    const [height, width] = picture.size;
    const [y, x] = this.get("pick").map((value) => Math.floor(value / picture.thinning));
    const cell = Math.max(1, picture.patch / picture.thinning);
    const top = Math.floor(y / cell) * cell;
    const left = Math.floor(x / cell) * cell;
    for (const { mark } of this.canvases.values()) {
      Object.assign(mark.style, {
        top: `${(100 * top) / height}%`,
        left: `${(100 * left) / width}%`,
        height: `${(100 * Math.min(cell, height - top)) / height}%`,
        width: `${(100 * Math.min(cell, width - left)) / width}%`,
      });
      mark.style.setProperty("--x", `${(100 * (x + 0.5 - left)) / Math.min(cell, width - left)}%`);
      mark.style.setProperty("--y", `${(100 * (y + 0.5 - top)) / Math.min(cell, height - top)}%`);
    }
  }

  drawLegend() {
    const { groups, classes } = this.parts.picture;
    const hidden = new Set(this.get("hidden"));
    refill(this.legend, [groups, classes, [...hidden]], () => {
      for (const [i, [name, labels]] of groups.entries()) this.addChip(name, labels, hidden, null, ` (key ${i + 1})`);
      for (const [label, name, colour] of classes) this.addChip(name, [label], hidden, colour, "");
    });
  }

  addChip(name, labels, hidden, colour, shortcut) {
    const isOff = labels.length > 0 && labels.every((label) => hidden.has(label));
    const button = addElement("button", this.legend, {
      type: "button",
      "aria-pressed": String(!isOff),
      title: `show or hide ${name}${shortcut}`,
      class: colour ? "mbs-chip" : "mbs-chip mbs-group",
    });
    if (colour) addSwatch(button, colour, labels[0] === VOID);
    button.append(name);
    button.addEventListener("click", () => this.toggle("hidden", labels));
  }

  drawTables() {
    const { tables } = this.parts.panels;
    const filter = new Set(this.get("flow_filter"));
    refill(this.tables, [tables, [...filter]], () => {
      for (const { title, rows, lines, can_filter } of tables) {
        const table = addElement("table", this.tables);
        addElement("caption", table, {}, title);
        for (const row of rows) this.addRow(table, row, can_filter, filter);
        for (const line of lines) addElement("div", this.tables, { class: "mbs-line" }, line);
      }
    });
  }

  addRow(table, row, canFilter, filter) {
    const isOff = canFilter && filter.size && !filter.has(row.code);
    const line = addElement("tr", table, isOff ? { class: "mbs-off" } : {});
    let label = addElement("td", line);
    if (canFilter) {
      const isPressed = String(filter.has(row.code));
      const attributes = { type: "button", "aria-pressed": isPressed, title: "show only these pixels" };
      label = addElement("button", label, attributes);
      label.addEventListener("click", () => this.toggle("flow_filter", [row.code]));
    }
    addSwatch(label, row.colour, row.is_hatched);
    label.append(row.name);
    addElement("td", line, { class: "mbs-number" }, row.count.toLocaleString("en"));
    addElement("td", line, { class: "mbs-number" }, `${(100 * row.share).toFixed(1)} %`);
  }

  drawChart() {
    const { curve } = this.parts.picture;
    if (curve) this.chart.innerHTML = drawCurve(curve, this.get("tau"));
    else this.chart.replaceChildren();
  }

  // Draw what is known about the picked pixel: lines of text, and a bar of each model for the most probable classes.
  drawCard() {
    const { lines, bars } = this.get("pixel");
    const tau = this.get("tau");
    refill(this.card, [lines, bars, tau], () => {
      if (!lines) return;
      for (const [i, line] of lines.entries())
        addElement("div", this.card, { class: i ? "mbs-line" : "mbs-caption" }, line);
      for (const bar of bars || []) this.addBar(bar, tau);
    });
  }

  addBar(bar, tau) {
    const row = addElement("div", this.card, { class: "mbs-bars" });
    addElement("span", row, { class: "mbs-name" }, bar.name);
    const tracks = addElement("span", row, { class: "mbs-tracks", style: `--tau:${100 * tau}%` });
    for (const age of ["old", "new"])
      addElement("span", tracks, { class: `mbs-${age}`, style: `width:${100 * (bar[age] ?? 0)}%` });
    const old = bar.old === null ? "–" : bar.old.toFixed(2);
    addElement("span", row, { class: "mbs-number" }, `${old} → ${bar.new.toFixed(2)}`);
  }

  // -- files

  // Send files that are dropped on the view to the kernel, which shows them.
  addDrop() {
    if (this.model.isSaved) return;
    const mark = (isOver) => this.root.classList.toggle("mbs-dropping", isOver);
    this.root.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      mark(true);
    });
    this.root.addEventListener("dragleave", () => mark(false));
    this.root.addEventListener("drop", async (event) => {
      event.preventDefault();
      event.stopPropagation();
      mark(false);
      const files = [...event.dataTransfer.files];
      const contents = await Promise.all(files.map((file) => file.arrayBuffer()));
      this.model.send({ dropped: files.map(({ name }) => name) }, undefined, contents);
    });
  }

  // -- zoom

  // The element whose style holds the zoom: all panels of a view, or of two runs side by side, share it.
  findZoomBox() {
    return this.root.closest(".mbs-pair") || this.root;
  }

  // Return scale, and the left upper corner of the zoomed picture in widths and heights of the panel.
  getZoom() {
    const { style } = this.findZoomBox();
    const read = (name) => parseFloat(style.getPropertyValue(name)) || 0;
    return { scale: read("--zoom") || 1, x: read("--zoom-x") / 100, y: read("--zoom-y") / 100 };
  }

  setZoom({ scale, x, y }) {
    const { style } = this.findZoomBox();
    style.setProperty("--zoom", scale);
    style.setProperty("--zoom-x", `${100 * clamp(x, 1 - scale, 0)}%`);
    style.setProperty("--zoom-y", `${100 * clamp(y, 1 - scale, 0)}%`);
    this.chooseSmoothing();
  }

  // Zoom by a factor; the point (u, v) of the panel, 0..1, stays where it is. Return whether anything changed.
  zoomAt(u, v, factor) {
    const { scale, x, y } = this.getZoom();
    const wanted = clamp(scale * factor, 1, MAX_ZOOM);
    const grown = wanted / scale;
    this.setZoom({ scale: wanted, x: u - (u - x) * grown, y: v - (v - y) * grown });
    return wanted !== scale;
  }

  zoomAtPick(factor) {
    const { scale, x, y } = this.getZoom();
    const { full_size } = this.parts.picture;
    const [row, column] = this.get("pick").map((value, axis) => (value + 0.5) / full_size[axis]);
    this.zoomAt(clamp(x + column * scale, 0, 1), clamp(y + row * scale, 0, 1), factor);
  }

  // Pixels stay sharp where they are enlarged; a picture with more pixels than its panel would show every nth only.
  chooseSmoothing() {
    const canvas = this.grid.querySelector("canvas");
    if (!canvas) return;
    const shown = canvas.clientWidth * this.getZoom().scale * devicePixelRatio;
    this.findZoomBox().classList.toggle("mbs-smooth", shown > 0 && shown < canvas.width);
  }

  addZoom(frame, canvas) {
    const hasFocus = () => this.grid.contains(document.activeElement);
    frame.addEventListener(
      "wheel",
      (event) => {
        if (!(event.ctrlKey || event.metaKey || hasFocus())) return; // the page scrolls
        const box = frame.getBoundingClientRect();
        const [u, v] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        if (this.zoomAt(u, v, Math.exp(-0.002 * clamp(event.deltaY, -200, 200)))) event.preventDefault();
      },
      { passive: false },
    );
    canvas.addEventListener("dblclick", () => this.setZoom(WHOLE));
    canvas.addEventListener("pointerdown", (event) => {
      this.isDragged = false;
      if (event.button || event.pointerType === "touch" || this.getZoom().scale === 1) return; // a finger scrolls
      this.drag(frame, canvas, event);
    });
  }

  // Move the zoomed picture with the pointer until it is released.
  drag(frame, canvas, start) {
    const from = this.getZoom();
    const box = frame.getBoundingClientRect();
    const ended = new AbortController();
    const move = (event) => {
      const [dx, dy] = [event.clientX - start.clientX, event.clientY - start.clientY];
      this.isDragged ||= Math.hypot(dx, dy) >= LEAST_DRAG;
      if (this.isDragged) this.setZoom({ ...from, x: from.x + dx / box.width, y: from.y + dy / box.height });
    };
    canvas.setPointerCapture(start.pointerId);
    canvas.addEventListener("pointermove", move, { signal: ended.signal });
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, () => ended.abort(), { signal: ended.signal });
  }

  // -- mouse and keys

  // Find the shown pixel [y, x] under the mouse.
  findPixel(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const [height, width] = this.parts.picture.size;
    const y = Math.floor(((event.clientY - box.top) * height) / box.height);
    const x = Math.floor(((event.clientX - box.left) * width) / box.width);
    return [clamp(y, 0, height - 1), clamp(x, 0, width - 1)];
  }

  // Say what the panels show at a pixel, without asking the kernel.
  describePixel([y, x]) {
    const { size, styles, thinning } = this.parts.picture;
    const maps = this.getMaps();
    const words = [];
    for (const { panel } of this.canvases.values()) {
      const values = maps[panel.key];
      if (!values || panel.kind === "colours") continue;
      if (panel.kind === "labels") {
        const label = values[y * size[1] + x];
        words.push(`${panel.short_title}: ${styles[panel.style].names[label]}`);
      } else {
        const [low, high] = this.getRange(panel);
        const value = values[Math.floor(y / panel.cell) * panel.columns + Math.floor(x / panel.cell)];
        words.push(`${panel.short_title}: ${(low + (value / 255) * (high - low)).toPrecision(2)}`);
      }
    }
    return `(${y * thinning}, ${x * thinning})  ${words.join(" · ")}`;
  }

  // Add all `values` to a list of the model, or remove them if all of them are in it.
  toggle(name, values) {
    const chosen = new Set(this.get(name));
    const areAllIn = values.every((value) => chosen.has(value));
    for (const value of values) {
      if (areAllIn) chosen.delete(value);
      else chosen.add(value);
    }
    this.set(name, [...chosen].sort((a, b) => a - b));
    this.redraw();
  }

  movePick(direction) {
    const { full_size, patch } = this.parts.picture;
    const moved = this.get("pick").map((value, axis) => clamp(value + direction[axis] * patch, 0, full_size[axis] - 1));
    this.set("pick", moved);
  }

  moveTau(hundredths) {
    this.set("tau", clamp(Math.round(100 * this.get("tau") + hundredths) / 100, 0, 1));
  }

  handleKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const { key } = event;
    const group = this.parts.picture.groups[+key - 1];
    if (ARROWS[key]) this.movePick(ARROWS[key]);
    else if (key === "n" || key === "p") this.model.send({ move: key === "n" ? 1 : -1 });
    else if (key === "[" || key === "]") this.moveTau(key === "]" ? 1 : -1);
    else if (key === "+" || key === "=") this.zoomAtPick(ZOOM_STEP);
    else if (key === "-") this.zoomAtPick(1 / ZOOM_STEP);
    else if (key === "0") this.setZoom(WHOLE);
    else if (key === "?") this.help.hidden = !this.help.hidden;
    else if (group) this.toggle("hidden", group[1]);
    else if (key === "m") {
      this.showsColours = !this.showsColours;
      this.redraw();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

export default {
  async render({ model, el }) {
    await new View(model, el).start();
  },
};
