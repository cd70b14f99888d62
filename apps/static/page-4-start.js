/* The view that is open, the keyboard, and what happens when the page starts. */
const KEYS = {
  s: 'sample, compare or measure', r: 'new seed', '← →': 'one step back or on',
  '↑ ↓': 'sample above or below', space: 'play or pause', '1 … 5': 'what the film shows',
  b: 'blink between two columns', Esc: 'close or stop', '?': 'this sheet',
};

function visible(selector) {
  const el = document.querySelector(selector);
  return el && el.offsetParent !== null ? el : null;
}

function press(selector) {
  const button = visible(selector);
  if (button) button.click();
  return Boolean(button);
}

function animate() {
  const chart = visible('#motion .js-plotly-plot');
  const button = chart?.layout.updatemenus?.[0].buttons[0];
  if (button) window.Plotly.animate(chart, ...button.args);
  return Boolean(button);
}

let hasCompared = false;
function showView() {
  const tab = document.querySelector('#views [role=tab][aria-selected=true]');
  const name = (tab?.textContent || 'Trajectory').trim().toLowerCase();
  const before = document.body.dataset.view;
  if (before === name) return;
  document.body.dataset.view = name;
  if (before !== undefined) put({view: name === 'trajectory' ? null : name});
  if (name === 'compare' && !hasCompared) {
    hasCompared = true;
    setTimeout(() => press('#contest'), 300);
  }
}

function watchViews() {
  let due = false;
  const look = () => { due = false; showView(); };
  const onChange = () => {
    if (!due) requestAnimationFrame(look);
    due = true;
  };
  const what = {subtree: true, childList: true, attributes: true};
  new MutationObserver(onChange).observe(
    document.querySelector('#views') || document.body,
    {...what, attributeFilter: ['aria-selected']},
  );
  showView();
}

function makeSheet() {
  const rows = Object.entries(KEYS).map(
    ([key, what]) => `<tr><td><kbd>${key}</kbd></td><td>${what}</td></tr>`,
  );
  const innerHTML = `<h2>Keyboard</h2><table>${rows.join('')}</table>`
    + '<form method="dialog"><button>Close</button></form>';
  const sheet = make('dialog', {id: 'keys', ariaLabel: 'keyboard', innerHTML});
  document.body.append(sheet);
  return sheet;
}

function isTyping(el) {
  const isField = el.tagName === 'INPUT' && !['range', 'radio', 'checkbox'].includes(el.type);
  return el.isContentEditable || isField || ['TEXTAREA', 'SELECT'].includes(el.tagName);
}

/* Does what a key means; whether it means anything here. */
function onKey(event, sheet) {
  const el = event.target;
  const film = visible('.reel .strip') && reel;
  const onRange = el.tagName === 'INPUT' && !el.classList.contains('scrub');
  const onButton = el.tagName === 'BUTTON' || onRange;
  const onTab = el.getAttribute('role') === 'tab';
  const inFilm = film && !onRange && document.activeElement?.closest('.reel');
  const moves = film && !onRange && !onTab;
  const layer = Object.keys(LAYERS)[+event.key - 1];
  if (layer && film) { film.look(layer); return true; }
  switch (event.key) {
    case '?': sheet.showModal(); return true;
    case 's': return !event.repeat && ['#sample', '#contest', '#measure'].some(press);
    case 'r': return !event.repeat && press('#reseed');
    case 'b':
      if (event.repeat || !visible('.arena') || !arena) return false;
      arena.blink();
      return true;
    case ' ':
      if (onButton) return false;
      if (!film) return animate();
      film.play();
      return true;
    case 'ArrowRight': if (moves) film.move(1); return moves;
    case 'ArrowLeft': if (moves) film.move(-1); return moves;
    case 'ArrowDown': if (inFilm) film.choose(1); return inFilm;
    case 'ArrowUp': if (inFilm) film.choose(-1); return inFilm;
    default: return false;
  }
}

function onClick(event, sheet) {
  const el = event.target;
  if (el.matches('input[role=combobox]:not([readonly])')) el.select();
  if (el.closest('#help')) sheet.showModal();
  if (el.closest('#share')) setTimeout(() => put({}), 200);
  if (innerWidth <= 900 && el.closest('#sample, #reseed')) {
    const numbers = document.querySelector('#numbers');
    numbers?.scrollIntoView({behavior: 'smooth', block: 'start'});
  }
}

function start() {
  watchViews();
  put({});
  const sheet = makeSheet();
  document.addEventListener('click', (event) => onClick(event, sheet));
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (isTyping(event.target) || sheet.open) return;
    if (onKey(event, sheet)) event.preventDefault();
  });
}

window.cudlab = {
  Reel, Arena, token, put, form, columns, save, saveChart, saveCharts, start,
  get reel() { return reel; },
  get arena() { return arena; },
};
