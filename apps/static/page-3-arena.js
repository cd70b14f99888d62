/* The comparison: one mosaic a column, on the same noise. */
const MODES = {
  side: 'side by side', blink: 'blink', slider: 'slider', difference: 'difference',
};
let arena = null;

class Arena {
  constructor(element, props, watch) {
    this.root = make('div', {className: 'arena'});
    element.querySelector('.stagehand').replaceChildren(this.root);
    this.mode = query.get('mode') in MODES ? query.get('mode') : 'side';
    this.pair = [0, 1];
    const read = () => this.take(typeof props.value === 'string' ? props.value : '');
    watch('value', read);
    read();
    arena = this;
  }

  take(text) {
    this.stop();
    const rows = parseLines(text);
    this.head = rows.shift();
    this.items = rows;
    if (!this.head) { this.root.replaceChildren(); return; }
    const [a, b] = this.pair;
    if (a === b || Math.max(a, b) >= rows.length) this.pair = [0, Math.min(1, rows.length - 1)];
    this.build();
  }

  choose(mode) {
    this.mode = mode;
    put({mode: mode === 'side' ? null : mode});
    this.stop();
    this.build();
  }

  picture(item, size, className = '') {
    return make('img', {src: item.src, alt: `samples of ${item.name}`, className, style: size});
  }

  build() {
    const modes = makeRadios('how to compare', MODES, this.mode, (mode) => this.choose(mode));
    const body = make('div', {className: `body ${this.mode}`});
    const isSide = this.mode === 'side';
    const zoom = Math.max(1, Math.floor((isSide ? 250 : 420) / this.head.w));
    const width = `width:${this.head.w * zoom}px`;
    const size = `${width};height:${this.head.h * zoom}px`;
    this.root.replaceChildren(modes, ...(isSide ? [] : [this.chooser()]), body);
    if (isSide) this.buildSide(body, size);
    else this.buildPair(body, size, width);
  }

  buildSide(body, size) {
    for (const item of this.items) {
      const letter = make('b', {textContent: item.letter});
      const words = make('span', {textContent: item.words});
      const caption = make('figcaption', {}, letter, ` ${item.name}`, words);
      body.append(make('figure', {}, caption, this.picture(item, size)));
    }
  }

  buildPair(body, size, width) {
    const [a, b] = this.pair.map((p) => this.items[p]);
    this.top = this.picture(b, size, 'top');
    const frame = make('div', {className: 'frame', style: size}, this.picture(a, size), this.top);
    this.label = make('output', {className: 'words'});
    body.append(frame, this.label);
    if (this.mode === 'blink') {
      this.on = true;
      this.blink();
    }
    if (this.mode === 'slider') {
      const ariaLabel = 'where the second covers the first';
      const range = {type: 'range', min: 0, max: 100, value: 50, ariaLabel, style: width};
      const cut = make('input', range);
      cut.oninput = () => { this.top.style.clipPath = `inset(0 0 0 ${cut.value}%)`; };
      cut.oninput();
      body.append(cut);
      this.label.textContent = `left ${a.letter} ${a.name}, right ${b.letter} ${b.name}`;
    }
    if (this.mode === 'difference') {
      const range = {type: 'range', min: 1, max: 16, value: 4, ariaLabel: 'amplification'};
      const gain = make('input', range);
      gain.oninput = () => {
        frame.style.filter = `brightness(${gain.value})`;
        this.label.textContent = `|${a.letter} − ${b.letter}|, ${gain.value} times as bright`;
      };
      gain.oninput();
      body.append(gain);
    }
  }

  chooser() {
    const row = make('div', {className: 'pair'});
    this.pair.forEach((chosen, k) => {
      const select = make('select', {ariaLabel: k ? 'second' : 'first'});
      select.onchange = () => { this.pair[k] = +select.value; this.stop(); this.build(); };
      this.items.forEach((item, value) => {
        const textContent = `${item.letter} ${item.name}`;
        select.append(make('option', {value, textContent, selected: value === chosen}));
      });
      row.append(select);
    });
    if (this.mode === 'blink') {
      const button = make('button', {type: 'button', className: 'play'}, 'blink by itself');
      button.onclick = () => {
        if (this.timer) this.stop();
        else this.timer = setInterval(() => this.blink(), 600);
      };
      row.append(button);
    }
    return row;
  }

  blink() {
    if (this.mode !== 'blink') { this.choose('blink'); return; }
    this.on = !this.on;
    this.top.style.visibility = this.on ? 'visible' : 'hidden';
    const item = this.items[this.pair[this.on ? 1 : 0]];
    this.label.textContent = `${item.letter} ${item.name}`;
  }

  keep() { (this.items || []).forEach((item) => save(item.src, `${item.letter}.png`)); }

  stop() { clearInterval(this.timer); this.timer = null; }
}
