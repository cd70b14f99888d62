/* What the page does without asking the server: the film with its scrubber, the comparison, the keyboard, the address. */
window.cudlab = (() => {
  const query = new URLSearchParams(location.search);
  const make = (tag, props = {}, ...children) => {
    const el = document.createElement(tag);
    for (const [k, v] of Object.entries(props)) k in el && k !== 'style' && k !== 'list' ? (el[k] = v) : el.setAttribute(k, v);
    el.append(...children);
    return el;
  };
  const lines = (text) => text.split('\n').filter(Boolean).map((line) => JSON.parse(line));

  /* The address: what differs from the usual is in the query, so that a copied link shows the same. */
  function put(values) {
    const found = new URLSearchParams(location.search);
    for (const [key, value] of Object.entries(values)) {
      if (value === null || value === undefined || value === '') found.delete(key); else found.set(key, String(value));
    }
    const text = found.toString();
    if (text.length <= 2000) history.replaceState(history.state, '', text ? '?' + text : location.pathname);
    document.querySelectorAll('[data-link]').forEach((el) => { el.value = location.href; });
  }
  const form = (names, usual, values) => put(Object.fromEntries(names.map((name, i) => [name, JSON.stringify(values[i]) === JSON.stringify(usual[i]) ? null : values[i]])));

  function columns(values, wide) {
    const found = {seed2: values[0] || null, count2: values[1] === 16 ? null : values[1]};
    ['a', 'b', 'c', 'd'].forEach((letter, k) => {
      const row = values.slice(2 + k * wide, 2 + (k + 1) * wide);
      found[letter] = row[0] && row[0] !== 'none' ? row.join('~') : null;
    });
    put(found);
  }

  /* The film: value is a text of JSON lines, a header and then one line a picture, so each update sends only what is new. */
  const NAMES = {x: ['state', 'x<sub>t</sub>'], hat: ['estimate', 'x̂<sub>0</sub>'], v: ['velocity', 'v'], gap: ['off the reference', 'x<sub>t</sub> − ref'], error: ['local error', 'ε']};
  let reel = null;

  class Reel {
    constructor(element, props, watch) {
      this.root = make('div', {className: 'reel'});
      element.querySelector('.stagehand').replaceChildren(this.root);
      this.layer = Object.keys(NAMES).includes(query.get('layer')) ? query.get('layer') : 'x';
      this.first = {step: query.get('step'), pick: query.get('pick'), layer: this.layer};
      this.text = '';
      this.read = () => this.take(typeof props.value === 'string' ? props.value : '');
      watch('value', this.read);
      this.read();
      reel = this;
    }
    take(text) {
      const fresh = !this.head || !text.startsWith(this.text.slice(0, this.text.indexOf('\n') + 1) || '\0');
      const news = lines(fresh ? text : text.slice(this.text.length));
      this.text = text;
      if (fresh) {
        this.stop();
        this.head = news.shift();
        if (!this.head) { this.root.replaceChildren(); return; }
        this.build();
      }
      for (const line of news) line.k === 'scale' ? Object.assign(this.head.reach, line.reach) : this.add(line);
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
      const tabs = make('div', {className: 'layers', role: 'radiogroup', ariaLabel: 'what the film shows'});
      this.tabs = {};
      for (const [key, [name, sign]] of Object.entries(NAMES)) {
        const b = make('button', {type: 'button', role: 'radio', innerHTML: `${name} <var>${sign}</var>`, onclick: () => this.look(key)});
        b.dataset.layer = key;
        tabs.append(this.tabs[key] = b);
      }
      this.strip = make('div', {className: 'strip', role: 'group', tabIndex: 0, ariaLabel: `film of ${count} samples by ${this.head.steps} steps`});
      this.strip.style.setProperty('--w', `${w * this.zoom}px`);
      this.strip.style.setProperty('--cell', `${h * this.zoom}px`);
      this.strip.style.setProperty('--h', `${count * h * this.zoom}px`);
      this.mark = make('i', {className: 'mark'});
      this.box = make('i', {className: 'box'});
      this.strip.append(this.mark, this.box);
      this.strip.onclick = (e) => {
        const col = e.target.closest('.col');
        if (!col) return;
        const at = e.clientY - col.querySelector('.cells').getBoundingClientRect().top;
        this.pick = Math.min(count - 1, Math.max(0, Math.floor(at / (h * this.zoom))));
        this.go(+col.dataset.i, true);
      };
      this.range = make('input', {type: 'range', min: 0, max: this.head.steps, value: 0, ariaLabel: 'step', className: 'scrub', oninput: () => this.go(+this.range.value, true)});
      this.playing = make('button', {type: 'button', className: 'play', ariaLabel: 'play', innerHTML: '▶', onclick: () => this.play()});
      this.words = make('output', {className: 'words'});
      this.stage = make('div', {className: 'stage', role: 'group', ariaLabel: 'the chosen cell, enlarged'});
      this.note = make('p', {className: 'caption note'});
      this.root.replaceChildren(tabs, make('div', {className: 'desk'}, make('div', {className: 'scroller'}, this.strip), this.stage), make('div', {className: 'player'}, this.playing, this.range, this.words), this.note);
    }
    add({k, i, t, src}) {
      let col = this.columns.find((c) => c.i === i);
      if (!col) {
        col = {i, t, src: {}, img: {}, cells: make('div', {className: 'cells'})};
        col.el = make('div', {className: 'col'}, make('span', {className: 'tick', textContent: i}), col.cells, make('span', {className: 'tick', textContent: t.toFixed(2)}));
        col.el.dataset.i = i;
        this.columns.push(col);
        this.columns.sort((a, b) => a.i - b.i);
        this.strip.insertBefore(col.el, this.columns[this.columns.indexOf(col) + 1]?.el || this.mark);
      }
      col.src[k] = src;
      if (!col.img[k]) {
        col.img[k] = make('img', {width: this.head.w * this.zoom, height: this.head.h * this.zoom * this.head.count, decoding: 'sync'});
        col.img[k].dataset.layer = k;
        col.cells.append(col.img[k]);
      }
      col.img[k].alt = `${NAMES[k][0]} of ${this.head.count} samples at step ${i} of ${this.head.steps}, t = ${t.toFixed(3)}`;
      col.img[k].src = src;
    }
    has(key) { return this.columns.some((c) => c.src[key]); }
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
      this.later = setTimeout(() => put({step: this.step || null, pick: this.pick ? this.pick + 1 : null}), 300);
    }
    nearest() { return this.columns.reduce((a, b) => (Math.abs(b.i - this.step) < Math.abs(a.i - this.step) ? b : a), this.columns[0]); }
    show() {
      if (!this.columns.length) return;
      const last = this.columns[this.columns.length - 1];
      if (this.wanted && this.has(this.wanted)) { this.layer = this.wanted; put({layer: this.layer}); this.wanted = null; }
      if (!this.follow && this.first.step !== null && last.i >= +this.first.step) { this.step = Math.min(+this.first.step || 0, this.head.steps); this.first.step = null; }
      if (last.i === this.head.steps && ['gap', 'error'].includes(this.first.layer) && !this.has(this.first.layer)) {
        const layer = this.first.layer;
        this.first.layer = null;
        setTimeout(() => this.look(layer), 800);
      }
      if (this.follow) this.step = last.i;
      const layer = this.has(this.layer) ? this.layer : 'x';
      this.root.dataset.layer = layer;
      for (const [key, b] of Object.entries(this.tabs)) {
        b.ariaChecked = String(key === layer);
        b.classList.toggle('absent', !this.has(key));
        b.title = this.has(key) ? '' : 'not measured yet: measures it';
      }
      const col = this.nearest();
      this.columns.forEach((c) => c.el.classList.toggle('now', c === col));
      const cell = this.head.h * this.zoom;
      this.box.style.cssText = `left:${col.el.offsetLeft}px;top:${col.cells.offsetTop + this.pick * cell}px;width:${this.head.w * this.zoom}px;height:${cell}px`;
      this.range.value = this.step;
      this.range.setAttribute('aria-valuetext', `step ${col.i}, t = ${col.t.toFixed(3)}`);
      this.words.innerHTML = `step <b>${col.i}</b> of ${this.head.steps} &ensp;t = <b>${col.t.toFixed(3)}</b> &ensp;sample <b>${this.pick + 1}</b>`;
      const reach = this.head.reach[layer];
      this.note.textContent = reach ? `Blue is −${reach}, red is +${reach}, and beyond; pale is nothing.` : '';
      if (reach && this.head.c === 3) this.note.textContent = `Mid grey is nothing; a channel is full at ±${reach}.`;
      const order = Object.keys(NAMES).filter((k) => this.has(k));
      const big = Math.max(1, Math.round((order.length > 3 ? 112 : 168) / Math.max(this.head.w, this.head.h)));
      if (this.stage.children.length !== order.length) this.stage.replaceChildren(...order.map((k) => { const f = make('figure', {}, make('div', {className: 'cell', role: 'img'}), make('figcaption', {innerHTML: `${NAMES[k][0]} <var>${NAMES[k][1]}</var>`})); f.dataset.layer = k; return f; }));
      for (const figure of this.stage.children) {
        const k = figure.dataset.layer, cellEl = figure.firstChild, src = col.src[k];
        const {w, h, count} = this.head;
        cellEl.style.cssText = `width:${w * big}px;height:${h * big}px;` + (src ? `background-image:url(${src});background-size:${w * big}px ${h * big * count}px;background-position:0 ${-this.pick * h * big}px` : '');
        cellEl.classList.toggle('empty', !src);
        cellEl.title = src ? '' : 'there is none at this step';
        cellEl.setAttribute('aria-label', `${NAMES[k][0]} of sample ${this.pick + 1} at step ${col.i}`);
      }
      const scroller = this.strip.parentElement;
      if (!this.follow && (col.el.offsetLeft < scroller.scrollLeft || col.el.offsetLeft + col.el.offsetWidth > scroller.scrollLeft + scroller.clientWidth)) scroller.scrollLeft = col.el.offsetLeft - scroller.clientWidth / 2;
    }
    move(by) {
      const at = this.columns.indexOf(this.nearest()) + by;
      if (this.columns[at]) this.go(this.columns[at].i, true);
    }
    stop() {
      clearInterval(this.timer);
      this.timer = null;
      if (this.playing) { this.playing.innerHTML = '▶'; this.playing.ariaLabel = 'play'; }
    }
    play() {
      if (this.timer) { this.stop(); return; }
      if (!this.columns.length) return;
      let at = this.columns.indexOf(this.nearest());
      if (at === this.columns.length - 1) at = -1;
      this.playing.innerHTML = '❚❚';
      this.playing.ariaLabel = 'pause';
      const tick = () => { at += 1; if (at >= this.columns.length) { this.stop(); return; } this.go(this.columns[at].i); };
      tick();
      this.timer = setInterval(tick, Math.max(90, 2400 / this.columns.length));
    }
  }

  /* The comparison: one mosaic a column, on the same noise. */
  let arena = null;

  class Arena {
    constructor(element, props, watch) {
      this.root = make('div', {className: 'arena'});
      element.querySelector('.stagehand').replaceChildren(this.root);
      this.mode = ['side', 'blink', 'slider', 'difference'].includes(query.get('mode')) ? query.get('mode') : 'side';
      this.pair = [0, 1];
      this.read = () => this.take(typeof props.value === 'string' ? props.value : '');
      watch('value', this.read);
      this.read();
      arena = this;
    }
    take(text) {
      this.stop();
      const rows = lines(text);
      this.head = rows.shift();
      this.items = rows;
      if (!this.head) { this.root.replaceChildren(); return; }
      if (this.pair.some((p) => p >= rows.length) || this.pair[0] === this.pair[1]) this.pair = [0, Math.min(1, rows.length - 1)];
      this.build();
    }
    build() {
      const modes = make('div', {className: 'layers', role: 'radiogroup', ariaLabel: 'how to compare'});
      for (const [key, name] of [['side', 'side by side'], ['blink', 'blink'], ['slider', 'slider'], ['difference', 'difference']]) {
        modes.append(make('button', {type: 'button', role: 'radio', textContent: name, ariaChecked: String(key === this.mode), onclick: () => { this.mode = key; put({mode: key === 'side' ? null : key}); this.stop(); this.build(); }}));
      }
      const body = make('div', {className: `body ${this.mode}`});
      this.root.replaceChildren(modes, ...(this.mode === 'side' ? [] : [this.chooser()]), body);
      const zoom = Math.max(1, Math.floor((this.mode === 'side' ? 250 : 420) / this.head.w));
      const size = `width:${this.head.w * zoom}px;height:${this.head.h * zoom}px`;
      const pic = (item, cls = '') => make('img', {src: item.src, alt: `samples of ${item.name}`, className: cls, style: size});
      if (this.mode === 'side') {
        for (const item of this.items) body.append(make('figure', {}, make('figcaption', {}, make('b', {textContent: item.letter}), ' ' + item.name, make('span', {textContent: item.words})), pic(item)));
        return;
      }
      const [a, b] = this.pair.map((p) => this.items[p]);
      const frame = make('div', {className: 'frame', style: size}, pic(a), pic(b, 'top'));
      this.top = frame.lastChild;
      this.label = make('output', {className: 'words'});
      body.append(frame, this.label);
      if (this.mode === 'blink') { this.on = true; this.blink(); }
      if (this.mode === 'slider') {
        const cut = make('input', {type: 'range', min: 0, max: 100, value: 50, ariaLabel: 'where the second covers the first', style: `width:${this.head.w * zoom}px`});
        cut.oninput = () => { this.top.style.clipPath = `inset(0 0 0 ${cut.value}%)`; };
        cut.oninput();
        body.append(cut);
        this.label.textContent = `left ${a.letter} ${a.name}, right ${b.letter} ${b.name}`;
      }
      if (this.mode === 'difference') {
        const gain = make('input', {type: 'range', min: 1, max: 16, value: 4, ariaLabel: 'amplification'});
        const tell = () => { frame.style.filter = `brightness(${gain.value})`; this.label.textContent = `|${a.letter} − ${b.letter}|, ${gain.value} times as bright`; };
        gain.oninput = tell;
        tell();
        body.append(gain);
      }
    }
    chooser() {
      const box = make('div', {className: 'pair'});
      this.pair.forEach((chosen, k) => {
        const select = make('select', {ariaLabel: k ? 'second' : 'first', onchange: () => { this.pair[k] = +select.value; this.stop(); this.build(); }});
        this.items.forEach((item, p) => select.append(make('option', {value: p, textContent: `${item.letter} ${item.name}`, selected: p === chosen})));
        box.append(select);
      });
      if (this.mode === 'blink') box.append(make('button', {type: 'button', className: 'play', textContent: 'blink by itself', onclick: () => { if (this.timer) this.stop(); else this.timer = setInterval(() => this.blink(), 600); }}));
      return box;
    }
    blink() {
      if (this.mode !== 'blink') { this.mode = 'blink'; put({mode: 'blink'}); this.build(); return; }
      this.on = !this.on;
      this.top.style.visibility = this.on ? 'visible' : 'hidden';
      const item = this.items[this.pair[this.on ? 1 : 0]];
      this.label.textContent = `${item.letter} ${item.name}`;
    }
    keep() { (this.items || []).forEach((item) => save(item.src, `${item.letter}.png`)); }
    stop() { clearInterval(this.timer); this.timer = null; }
  }

  const shown = (selector) => { const el = document.querySelector(selector); return el && el.offsetParent !== null ? el : null; };

  /* Files: the server gives the bytes as a data address, the page saves them; charts are saved from what is drawn. */
  function save(url, name) {
    if (!url) return;
    const a = make('a', {href: url, download: name});
    document.body.append(a);
    a.click();
    a.remove();
  }
  function svg(id, name) {
    const chart = document.querySelector(`#${id} .js-plotly-plot`);
    if (chart && window.Plotly) window.Plotly.toImage(chart, {format: 'svg', width: chart.clientWidth || 900, height: chart.clientHeight || 500}).then((url) => save(url, name));
  }

  function animate() {
    const chart = shown('#motion .js-plotly-plot'), play = chart && chart.layout.updatemenus && chart.layout.updatemenus[0].buttons[0];
    if (play) window.Plotly.animate(chart, ...play.args);
    return Boolean(play);
  }

  let filled = false;
  function view() {
    const tab = document.querySelector('#views > .tab-wrapper [role=tab][aria-selected=true], #views [role=tab][aria-selected=true]');
    const name = (tab?.textContent || 'Trajectory').trim().toLowerCase();
    if (document.body.dataset.view !== name) {
      const before = document.body.dataset.view;
      document.body.dataset.view = name;
      if (before !== undefined) put({view: name === 'trajectory' ? null : name});
      if (name === 'compare' && !filled) { filled = true; setTimeout(() => shown('#contest')?.click(), 300); }
    }
  }
  function start() {
    let due = false;
    new MutationObserver(() => { if (!due) { due = true; requestAnimationFrame(() => { due = false; view(); }); } })
      .observe(document.querySelector('#views') || document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ['aria-selected']});
    view();
    put({});
    const sheet = make('dialog', {id: 'keys', ariaLabel: 'keyboard'});
    const rows = [['s', 'sample, compare or measure'], ['r', 'new seed'], ['← →', 'one step back or on'], ['↑ ↓', 'sample above or below'], ['space', 'play or pause'], ['1 … 5', 'what the film shows'], ['b', 'blink between two columns'], ['Esc', 'close or stop'], ['?', 'this sheet']];
    sheet.innerHTML = '<h2>Keyboard</h2><table>' + rows.map(([k, what]) => `<tr><td><kbd>${k}</kbd></td><td>${what}</td></tr>`).join('') + '</table><form method="dialog"><button>Close</button></form>';
    document.body.append(sheet);
    document.addEventListener('click', (e) => {
      if (e.target.matches('input[role=combobox]:not([readonly])')) e.target.select();
      if (e.target.closest('#help')) sheet.showModal();
      if (e.target.closest('#share')) setTimeout(() => put({}), 200);
      if (innerWidth <= 900 && e.target.closest('#sample, #reseed')) document.querySelector('#numbers')?.scrollIntoView({behavior: 'smooth', block: 'start'});
    });
    document.addEventListener('keydown', (e) => {
      if (e.ctrlKey || e.metaKey || e.altKey) return;
      const el = e.target;
      const typing = el.isContentEditable || ['TEXTAREA', 'SELECT'].includes(el.tagName) || (el.tagName === 'INPUT' && !['range', 'radio', 'checkbox'].includes(el.type));
      if (typing || sheet.open) return;
      const onRange = el.tagName === 'INPUT' && !el.classList.contains('scrub'), onButton = el.tagName === 'BUTTON' || onRange, onTab = el.getAttribute('role') === 'tab';
      const film = shown('.reel .strip') && reel, press = (id) => { const b = shown(id); if (b) b.click(); return b; };
      const layer = Object.keys(NAMES)[+e.key - 1];
      const act = {
        '?': () => (sheet.showModal(), true),
        s: () => !e.repeat && ['#sample', '#contest', '#measure'].some(press),
        r: () => !e.repeat && press('#reseed'),
        b: () => !e.repeat && shown('.arena') && arena && (arena.blink(), true),
        ' ': () => !onButton && (film ? (film.play(), true) : animate()),
        ArrowRight: () => !onRange && !onTab && film && (film.move(1), true),
        ArrowLeft: () => !onRange && !onTab && film && (film.move(-1), true),
        ArrowDown: () => !onRange && film && document.activeElement?.closest('.reel') && (film.pick = Math.min(film.pick + 1, film.head.count - 1), film.go(film.step, true), true),
        ArrowUp: () => !onRange && film && document.activeElement?.closest('.reel') && (film.pick = Math.max(film.pick - 1, 0), film.go(film.step, true), true),
      }[e.key] || (layer && film ? () => (film.look(layer), true) : null);
      if (act && act()) e.preventDefault();
    });
  }
  return {Reel, Arena, put, form, columns, save, svg, start, get reel() { return reel; }, get arena() { return arena; }};
})();
