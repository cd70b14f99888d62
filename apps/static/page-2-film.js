/* The film: its value is a text of JSON lines, a header and then one line a picture, so that each
   update sends only what is new. */
const LAYERS = {
  x: ['state', 'x<sub>t</sub>'],
  hat: ['estimate', 'x̂<sub>0</sub>'],
  v: ['velocity', 'v'],
  gap: ['off the reference', 'x<sub>t</sub> − ref'],
  error: ['local error', 'ε'],
};
let reel = null;

class Reel {
  constructor(element, props, watch) {
    this.root = make('div', {className: 'reel'});
    element.querySelector('.stagehand').replaceChildren(this.root);
    this.layer = query.get('layer') in LAYERS ? query.get('layer') : 'x';
    this.first = {step: query.get('step'), pick: query.get('pick'), layer: this.layer};
    this.text = '';
    const read = () => this.take(typeof props.value === 'string' ? props.value : '');
    watch('value', read);
    read();
    reel = this;
  }

  take(text) {
    const header = this.text.slice(0, this.text.indexOf('\n') + 1);
    const fresh = !this.head || !header || !text.startsWith(header);
    const news = parseLines(fresh ? text : text.slice(this.text.length));
    this.text = text;
    if (fresh) {
      this.stop();
      this.head = news.shift();
      if (!this.head) { this.root.replaceChildren(); return; }
      this.build();
    }
    for (const line of news) {
      if (line.k === 'scale') Object.assign(this.head.reach, line.reach);
      else this.add(line);
    }
    if (news.length) this.show();
  }

  build() {
    const {count, w, h} = this.head;
    const near = count <= 16 ? 48 : 32; // pixels of a cell
    this.zoom = Math.max(1, Math.round(near / Math.max(w, h)));
    this.columns = [];
    this.pick = Math.min(Math.max(0, (parseInt(this.first.pick) || 1) - 1), count - 1);
    this.step = 0;
    this.follow = this.first.step === null;
    const choices = {};
    for (const [key, [name, sign]] of Object.entries(LAYERS)) {
      choices[key] = `${name} <var>${sign}</var>`;
    }
    this.tabs = makeRadios('what the film shows', choices, this.layer, (key) => this.look(key));
    this.stage = make('div', {className: 'stage', role: 'group'});
    this.stage.ariaLabel = 'the chosen cell, enlarged';
    this.note = make('p', {className: 'caption note'});
    const scroller = make('div', {className: 'scroller'}, this.buildStrip());
    const desk = make('div', {className: 'desk'}, scroller, this.stage);
    this.root.replaceChildren(this.tabs, desk, this.buildPlayer(), this.note);
  }

  buildStrip() {
    const {count, w, h, steps} = this.head;
    const ariaLabel = `film of ${count} samples by ${steps} steps`;
    this.strip = make('div', {className: 'strip', role: 'group', tabIndex: 0, ariaLabel});
    this.strip.style.setProperty('--w', `${w * this.zoom}px`);
    this.strip.style.setProperty('--cell', `${h * this.zoom}px`);
    this.strip.style.setProperty('--h', `${count * h * this.zoom}px`);
    this.mark = make('i', {className: 'mark'});
    this.box = make('i', {className: 'box'});
    this.strip.append(this.mark, this.box);
    this.strip.onclick = (event) => {
      const column = event.target.closest('.col');
      if (!column) return;
      const at = event.clientY - column.querySelector('.cells').getBoundingClientRect().top;
      this.pick = Math.min(count - 1, Math.max(0, Math.floor(at / (h * this.zoom))));
      this.go(+column.dataset.i, true);
    };
    return this.strip;
  }

  buildPlayer() {
    const {steps} = this.head;
    const range = {type: 'range', min: 0, max: steps, value: 0, ariaLabel: 'step'};
    this.range = make('input', {...range, className: 'scrub'});
    this.range.oninput = () => this.go(+this.range.value, true);
    this.button = make('button', {type: 'button', className: 'play', ariaLabel: 'play'}, '▶');
    this.button.onclick = () => this.play();
    this.words = make('output', {className: 'words'});
    return make('div', {className: 'player'}, this.button, this.range, this.words);
  }

  column(i, t) {
    let column = this.columns.find((c) => c.i === i);
    if (column) return column;
    column = {i, t, src: {}, img: {}, cells: make('div', {className: 'cells'})};
    const tick = (textContent) => make('span', {className: 'tick', textContent});
    column.el = make('div', {className: 'col'}, tick(i), column.cells, tick(t.toFixed(2)));
    column.el.dataset.i = i;
    this.columns.push(column);
    this.columns.sort((a, b) => a.i - b.i);
    const after = this.columns[this.columns.indexOf(column) + 1];
    this.strip.insertBefore(column.el, after?.el || this.mark);
    return column;
  }

  add({k, i, t, src}) {
    const {count, w, h, steps} = this.head;
    const column = this.column(i, t);
    column.src[k] = src;
    if (!column.img[k]) {
      const size = {width: w * this.zoom, height: h * this.zoom * count};
      column.img[k] = make('img', {...size, decoding: 'sync'});
      column.img[k].dataset.layer = k;
      column.cells.append(column.img[k]);
    }
    const at = `step ${i} of ${steps}, t = ${t.toFixed(3)}`;
    column.img[k].alt = `${LAYERS[k][0]} of ${count} samples at ${at}`;
    column.img[k].src = src;
  }

  has(key) { return this.columns.some((column) => column.src[key]); }

  look(key) {
    if (!this.has(key)) {
      document.querySelector('#errors')?.click();
      this.wanted = key;
      return;
    }
    this.layer = key;
    put({layer: key === 'x' ? null : key});
    this.show();
  }

  go(step, byHand = false) {
    this.step = Math.min(this.head.steps, Math.max(0, step));
    this.follow = false;
    if (byHand) this.stop();
    this.show();
    clearTimeout(this.later);
    const tell = () => put({step: this.step || null, pick: this.pick ? this.pick + 1 : null});
    this.later = setTimeout(tell, 300);
  }

  nearest() {
    const distance = (column) => Math.abs(column.i - this.step);
    return this.columns.reduce((a, b) => (distance(b) < distance(a) ? b : a), this.columns[0]);
  }

  /* What the address or a key asked for before it was there. */
  catchUp(last) {
    const {first} = this;
    if (this.wanted && this.has(this.wanted)) {
      this.layer = this.wanted;
      this.wanted = null;
      put({layer: this.layer});
    }
    if (!this.follow && first.step !== null && last.i >= +first.step) {
      this.step = Math.min(+first.step || 0, this.head.steps);
      first.step = null;
    }
    const isMeasured = ['gap', 'error'].includes(first.layer);
    if (last.i === this.head.steps && isMeasured && !this.has(first.layer)) {
      const layer = first.layer;
      first.layer = null;
      setTimeout(() => this.look(layer), 800);
    }
    if (this.follow) this.step = last.i;
  }

  show() {
    if (!this.columns.length) return;
    this.catchUp(this.columns[this.columns.length - 1]);
    const layer = this.has(this.layer) ? this.layer : 'x';
    this.root.dataset.layer = layer;
    for (const button of this.tabs.children) {
      const key = button.dataset.layer;
      button.ariaChecked = String(key === layer);
      button.classList.toggle('absent', !this.has(key));
      button.title = this.has(key) ? '' : 'not measured yet: measures it';
    }
    const column = this.nearest();
    this.columns.forEach((c) => c.el.classList.toggle('now', c === column));
    this.showBox(column);
    this.showWords(column, layer);
    this.showStage(column);
    this.scrollTo(column);
  }

  showBox(column) {
    const {w, h} = this.head;
    const cell = h * this.zoom;
    const top = column.cells.offsetTop + this.pick * cell;
    const place = `left:${column.el.offsetLeft}px;top:${top}px`;
    this.box.style.cssText = `${place};width:${w * this.zoom}px;height:${cell}px`;
  }

  showWords(column, layer) {
    const {steps, reach, c} = this.head;
    const t = column.t.toFixed(3);
    this.range.value = this.step;
    this.range.setAttribute('aria-valuetext', `step ${column.i}, t = ${t}`);
    this.words.innerHTML = `step <b>${column.i}</b> of ${steps} &ensp;t = <b>${t}</b> `
      + `&ensp;sample <b>${this.pick + 1}</b>`;
    const full = reach[layer];
    let note = full ? `Blue is −${full}, red is +${full}, and beyond; pale is nothing.` : '';
    if (full && c === 3) note = `Mid grey is nothing; a channel is full at ±${full}.`;
    this.note.textContent = note;
  }

  showStage(column) {
    const {w, h, count} = this.head;
    const keys = Object.keys(LAYERS).filter((key) => this.has(key));
    const near = keys.length > 3 ? 112 : 168;
    const big = Math.max(1, Math.round(near / Math.max(w, h)));
    if (this.stage.children.length !== keys.length) {
      this.stage.replaceChildren(...keys.map((key) => {
        const innerHTML = `${LAYERS[key][0]} <var>${LAYERS[key][1]}</var>`;
        const cell = make('div', {className: 'cell', role: 'img'});
        const figure = make('figure', {}, cell, make('figcaption', {innerHTML}));
        figure.dataset.layer = key;
        return figure;
      }));
    }
    for (const figure of this.stage.children) {
      const key = figure.dataset.layer;
      const src = column.src[key];
      const {style} = figure.firstChild;
      style.cssText = `width:${w * big}px;height:${h * big}px`;
      if (src) {
        style.backgroundImage = `url(${src})`;
        style.backgroundSize = `${w * big}px ${h * big * count}px`;
        style.backgroundPosition = `0 ${-this.pick * h * big}px`;
      }
      figure.firstChild.classList.toggle('empty', !src);
      figure.firstChild.title = src ? '' : 'there is none at this step';
      figure.firstChild.ariaLabel =
        `${LAYERS[key][0]} of sample ${this.pick + 1} at step ${column.i}`;
    }
  }

  scrollTo(column) {
    const scroller = this.strip.parentElement;
    const left = column.el.offsetLeft;
    const right = left + column.el.offsetWidth;
    const isHidden = left < scroller.scrollLeft
      || right > scroller.scrollLeft + scroller.clientWidth;
    if (!this.follow && isHidden) scroller.scrollLeft = left - scroller.clientWidth / 2;
  }

  move(by) {
    const column = this.columns[this.columns.indexOf(this.nearest()) + by];
    if (column) this.go(column.i, true);
  }

  choose(by) {
    this.pick = Math.min(Math.max(this.pick + by, 0), this.head.count - 1);
    this.go(this.step, true);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    if (this.button) Object.assign(this.button, {textContent: '▶', ariaLabel: 'play'});
  }

  play() {
    if (this.timer) { this.stop(); return; }
    if (!this.columns.length) return;
    let at = this.columns.indexOf(this.nearest());
    if (at === this.columns.length - 1) at = -1;
    Object.assign(this.button, {textContent: '❚❚', ariaLabel: 'pause'});
    const tick = () => {
      at += 1;
      if (at >= this.columns.length) this.stop();
      else this.go(this.columns[at].i);
    };
    tick();
    this.timer = setInterval(tick, Math.max(90, 2400 / this.columns.length));
  }
}
