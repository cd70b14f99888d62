/* The token that starts jobs goes from the address into this tab before anything reads that. */
const TOKEN = 'cudlab-token';

function keepToken() {
  const found = new URLSearchParams(location.search);
  if (!found.has('token')) return;
  sessionStorage.setItem(TOKEN, found.get('token'));
  found.delete('token');
  history.replaceState(history.state, '', `${location.pathname}?${found}`.replace(/\?$/, ''));
}

keepToken();

function token() {
  return sessionStorage.getItem(TOKEN) || '';
}

/* Small tools, and the address: what differs from the usual is in the query, so that a copied link
   shows the same. */
const query = new URLSearchParams(location.search);

function make(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key in el && key !== 'style' && key !== 'list') el[key] = value;
    else el.setAttribute(key, value);
  }
  el.append(...children);
  return el;
}

function parseLines(text) {
  return text.split('\n').filter(Boolean).map((line) => JSON.parse(line));
}

/* A row of buttons of which one is on. */
function makeRadios(label, choices, now, choose) {
  const row = make('div', {className: 'layers', role: 'radiogroup', ariaLabel: label});
  for (const [key, innerHTML] of Object.entries(choices)) {
    const onclick = () => choose(key);
    const ariaChecked = String(key === now);
    const button = make('button', {type: 'button', role: 'radio', innerHTML, ariaChecked, onclick});
    button.dataset.layer = key;
    row.append(button);
  }
  return row;
}

function put(values) {
  const found = new URLSearchParams(location.search);
  for (const [key, value] of Object.entries(values)) {
    if (value === null || value === undefined || value === '') found.delete(key);
    else found.set(key, String(value));
  }
  const text = found.toString();
  const address = text ? `?${text}` : location.pathname;
  if (text.length <= 2000) history.replaceState(history.state, '', address);
  document.querySelectorAll('[data-link]').forEach((el) => { el.value = location.href; });
}

function form(names, usual, values) {
  const found = {};
  names.forEach((name, i) => {
    const value = Array.isArray(values[i]) ? values[i].join(' ') : values[i];
    found[name] = value === usual[i] ? null : value;
  });
  put(found);
}

function columns([seed, count, ...values], wide) {
  const found = {seed2: seed || null, count2: count === 16 ? null : count};
  ['a', 'b', 'c', 'd'].forEach((letter, k) => {
    const row = values.slice(k * wide, (k + 1) * wide);
    found[letter] = row[0] && row[0] !== 'none' ? row.join('~') : null;
  });
  put(found);
}

/* Files: the server gives the bytes as a data address, the page saves them; charts are saved from
   what is drawn. */
function save(url, name) {
  if (!url) return;
  const link = make('a', {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
}

function saveChart(id, name) {
  const chart = document.querySelector(`#${id} .js-plotly-plot`);
  if (!chart || !window.Plotly) return;
  const size = {width: chart.clientWidth || 900, height: chart.clientHeight || 500};
  window.Plotly.toImage(chart, {format: 'svg', ...size}).then((url) => save(url, name));
}

function saveCharts() {
  ['paths', 'motion', 'panels', 'schedule'].forEach((id) => saveChart(id, `${id}.svg`));
}
