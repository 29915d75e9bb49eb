// The view of a test set: thumbnails to sort, filter and open.
//
// A model holds what is chosen, as described in mbs.explore.test_set, and answers three requests: for the records of
// pictures, for thumbnails, and to open a picture. Every number and every text of a picture comes from the kernel.

const ANY_CLASS = -1;
const PAGE = 36; // thumbnails

function addElement(tag, parent, attributes = {}, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

class Grid {
  constructor(model, parent) {
    this.model = model;
    this.facts = model.get("facts");
    this.records = new Map(); // by position, of the chosen step
    this.pairs = [];
    this.nLeft = null; // pieces of work that are not done; null: not known yet
    this.step = model.get("step"); // of the records
    this.pictures = new Map(); // address of a thumbnail by step, layer and position
    this.asked = new Set(); // keys of thumbnails that are on their way
    this.page = 0;
    this.isVisible = false;
    this.isAsking = false;
    this.build(parent);
  }

  get(name) {
    return this.model.get(name);
  }

  choose(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  build(parent) {
    const { facts } = this;
    this.root = addElement("div", parent, { class: "mbs-grid", "data-lm-suppress-shortcuts": "true" });
    this.heading = addElement("div", this.root, { class: "mbs-grid-heading" });
    const bar = addElement("div", this.root, { class: "mbs-grid-bar" });
    const list = (values) => values.map((value) => [value, value]);
    this.selects = {
      step: this.addSelect(bar, "After step", "step", list(facts.steps), Number),
      layer: this.addSelect(bar, "Show", "layer", list(facts.layers), String),
      order: this.addSelect(bar, "Sort by", "order", list(facts.orders), String),
      contains: this.addSelect(bar, "Contains", "contains", this.listClasses(), Number),
      place: this.addSelect(bar, "in", "place", list(facts.places), String),
      pair: this.addSelect(bar, "Confused pair", "pair", [["", "any"]], (text) => (text ? JSON.parse(text) : [])),
    };
    const pages = addElement("div", this.root, { class: "mbs-grid-bar" });
    this.previous = addElement("button", pages, { type: "button", title: "previous page" }, "◀");
    this.place = addElement("span", pages);
    this.next = addElement("button", pages, { type: "button", title: "next page" }, "▶");
    this.found = addElement("span", pages);
    this.busy = addElement("span", pages, { class: "mbs-grid-busy", role: "status" });
    this.previous.addEventListener("click", () => this.turnPage(-1));
    this.next.addEventListener("click", () => this.turnPage(1));
    this.legend = addElement("div", this.root, { class: "mbs-grid-legend" });
    this.grid = addElement("div", this.root, { class: "mbs-grid-pictures" });
    this.grid.addEventListener("pointerleave", () => this.draw());
  }

  listClasses() {
    return [[ANY_CLASS, "any class"], ...this.facts.names.map((name, channel) => [channel, name])];
  }

  addSelect(parent, label, name, options, parse) {
    const box = addElement("label", parent, {}, `${label} `);
    const select = addElement("select", box, { "aria-label": label });
    for (const [value, text] of options) addElement("option", select, { value }, String(text));
    select.addEventListener("change", () => this.choose(name, parse(select.value)));
    return select;
  }

  start() {
    this.model.on("msg:custom", (content, buffers) => this.receive(content, buffers));
    for (const name of Object.keys(this.selects)) this.model.on(`change:${name}`, () => this.changeChoice(name));
    new IntersectionObserver((entries) => {
      this.isVisible = entries.at(-1).isIntersecting;
      this.askForRecords();
    }).observe(this.root);
    this.draw();
  }

  changeChoice(name) {
    if (name === "step") {
      this.step = this.get("step");
      this.records.clear();
      this.pairs = [];
      this.nLeft = null;
      this.isAsking = false;
      this.askForRecords();
    }
    if (name !== "layer") this.page = 0;
    this.draw();
  }

  // -- requests and answers

  // Ask for more records while the view is on the screen and some are missing.
  askForRecords() {
    if (this.isAsking || !this.isVisible || this.nLeft === 0) return;
    this.isAsking = true;
    this.model.send({ ask: "records", is_new: this.nLeft === null });
  }

  askForThumbnails(records) {
    const missing = records.map(({ position }) => position).filter((i) => !this.asked.has(this.nameThumbnail(i)));
    if (!missing.length) return;
    for (const position of missing) this.asked.add(this.nameThumbnail(position));
    this.model.send({ ask: "thumbnails", positions: missing });
  }

  nameThumbnail(position) {
    return `${this.step}/${this.get("layer")}/${position}`;
  }

  receive(content, buffers) {
    if (content.answer === "records") this.receiveRecords(content);
    else if (content.answer === "thumbnails") this.receiveThumbnails(content, buffers);
    else if (content.answer === "opened") this.showOpened(content);
  }

  receiveRecords({ step, records, pairs, n_left }) {
    if (step !== this.step) return;
    for (const record of records) this.records.set(record.position, record);
    this.pairs = pairs;
    this.nLeft = n_left;
    this.isAsking = false;
    this.draw(this.grid.matches(":hover"));
    this.askForRecords();
  }

  receiveThumbnails({ step, layer, positions }, buffers) {
    positions.forEach((position, k) => {
      const key = `${step}/${layer}/${position}`;
      this.pictures.set(key, URL.createObjectURL(new Blob([buffers[k]], { type: "image/jpeg" })));
      for (const image of this.grid.querySelectorAll(`img[data-key="${key}"]`)) image.src = this.pictures.get(key);
    });
  }

  open(record) {
    this.opening = `Opening ${record.name} …`;
    this.drawStatus();
    this.model.send({ ask: "open", position: record.position });
  }

  showOpened({ sentence }) {
    this.opening = sentence;
    this.drawStatus();
    if (sentence) return;
    const below = this.root.parentElement.nextElementSibling;
    setTimeout(() => below?.scrollIntoView({ block: "nearest", behavior: "smooth" }), 300);
  }

  // -- what is shown

  // Tell whether a picture passes the filters, as GridState.is_wanted does.
  isWanted({ truth, predicted, pairs }) {
    const [contains, place] = [this.get("contains"), this.get("place")];
    const [true_, guessed] = this.get("pair");
    const isHeld =
      contains === ANY_CLASS ||
      (place !== "prediction" && truth.includes(contains)) ||
      (place !== "truth" && predicted.includes(contains));
    return isHeld && (true_ === undefined || pairs.some((pair) => pair[0] === true_ && pair[1] === guessed));
  }

  findPair({ pairs }) {
    const [true_, guessed] = this.get("pair");
    return pairs.find((pair) => pair[0] === true_ && pair[1] === guessed);
  }

  // List the records that pass the filters, in order, as GridState.choose does.
  list() {
    const order = this.get("order");
    const records = [...this.records.values()].filter((record) => this.isWanted(record));
    const compareNames = (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0);
    const getKey = (record) => {
      const pair = order === "most confused" && this.findPair(record);
      return pair ? -pair[2] : (record.keys[order] ?? Infinity);
    };
    const compareKeys = (a, b) => (getKey(a) === getKey(b) ? 0 : getKey(a) - getKey(b));
    return records.sort((a, b) => (order === "name" && compareNames(a, b)) || compareKeys(a, b) || a.position - b.position);
  }

  turnPage(by) {
    this.page += by;
    this.draw();
  }

  // Draw everything; while the mouse is over the pictures they keep their places.
  draw(keepsPlaces = false) {
    this.heading.textContent = `${this.get("title")}, test set`;
    this.drawChoice();
    if (!keepsPlaces) this.shown = this.list();
    const nPages = Math.max(1, Math.ceil(this.shown.length / PAGE));
    this.page = Math.min(Math.max(this.page, 0), nPages - 1);
    this.previous.disabled = this.page === 0;
    this.next.disabled = this.page === nPages - 1;
    this.place.textContent = `Page ${this.page + 1} / ${nPages}`;
    this.found.textContent = `${this.shown.length.toLocaleString("en")} of ${this.facts.n_pictures.toLocaleString("en")} pictures`;
    this.drawStatus();
    this.drawLegend();
    this.drawPictures(this.shown.slice(this.page * PAGE, (this.page + 1) * PAGE));
  }

  drawStatus() {
    const isComputing = this.nLeft === null || this.nLeft > 0;
    const done = isComputing && this.nLeft !== null ? `, ${this.nLeft.toLocaleString("en")} predictions left` : "";
    this.busy.textContent = this.opening || (isComputing ? `Computing …${done}` : "");
    this.root.dataset.left = this.nLeft ?? "";
  }

  drawChoice() {
    const { pair } = this.selects;
    const known = JSON.stringify(this.pairs);
    if (pair.dataset.known !== known && document.activeElement !== pair) {
      pair.replaceChildren();
      addElement("option", pair, { value: "" }, "any");
      for (const [true_, guessed, text] of this.pairs)
        addElement("option", pair, { value: JSON.stringify([true_, guessed]) }, text);
      pair.dataset.known = known;
    }
    for (const [name, select] of Object.entries(this.selects)) {
      const value = name === "pair" ? (this.get(name).length ? JSON.stringify(this.get(name)) : "") : this.get(name);
      const text = String(value);
      if (name === "pair" && text && ![...select.options].some((option) => option.value === text)) {
        const [true_, guessed] = value ? JSON.parse(text) : [];
        addElement("option", select, { value: text }, `${this.facts.names[true_]} → ${this.facts.names[guessed]}`);
      }
      if (select.value !== text) select.value = text;
    }
    this.selects.step.parentElement.hidden = this.facts.steps.length === 1;
    this.selects.place.parentElement.hidden = this.get("contains") === ANY_CLASS;
  }

  drawLegend() {
    const layer = this.get("layer");
    if (this.legend.dataset.layer === layer) return;
    this.legend.replaceChildren();
    for (const [name, colour] of this.facts.legends[layer]) {
      const entry = addElement("span", this.legend);
      addElement("span", entry, { class: "mbs-grid-swatch", style: `background:rgb(${colour})` });
      entry.append(name);
    }
    this.legend.dataset.layer = layer;
  }

  drawPictures(records) {
    const texts = records.map((record) => this.describe(record));
    const drawn = JSON.stringify([this.step, this.get("layer"), records.map(({ position }) => position), texts]);
    if (this.grid.dataset.drawn !== drawn) {
      const focused = document.activeElement?.dataset?.position;
      this.grid.replaceChildren();
      records.forEach((record, k) => this.addPicture(record, texts[k]));
      if (focused !== undefined) this.grid.querySelector(`[data-position="${focused}"]`)?.focus();
      this.grid.dataset.drawn = drawn;
    }
    this.askForThumbnails(records);
  }

  describe(record) {
    const order = this.get("order");
    const pair = order === "most confused" && this.findPair(record);
    return pair ? pair[3] : record.texts[order];
  }

  addPicture(record, text) {
    const key = this.nameThumbnail(record.position);
    const attributes = { class: "mbs-grid-picture", "data-position": record.position };
    const isButton = this.facts.can_open;
    const name = `${record.name}: ${text}`;
    const more = isButton ? { type: "button", title: `open ${name}` } : { title: name };
    const box = addElement(isButton ? "button" : "figure", this.grid, { ...attributes, ...more });
    const image = addElement("img", box, { "data-key": key, alt: `${this.get("layer")} of ${name}` });
    if (this.pictures.has(key)) image.src = this.pictures.get(key);
    addElement("span", box, { class: "mbs-grid-name" }, record.name);
    addElement("span", box, { class: "mbs-grid-text" }, text);
    if (isButton) box.addEventListener("click", () => this.open(record));
  }
}

export default {
  render({ model, el }) {
    new Grid(model, el).start();
  },
};
