// The list of runs: a thousand rows at once. The grid that comes with Gradio holds the page for
// seconds, a plain table does not. The value is JSON: {headers, numeric, rows}.
const box = element.querySelector('.runs-list');
const order = {by: -1, up: true};
const NEWEST_FIRST = 8; // the column of times starts with the newest
let headers = [], numeric = new Set(), rows = [], chosen = null;

const make = (tag, text) => {
  const el = document.createElement(tag);
  if (text !== undefined) el.textContent = text;
  return el;
};

const format = (value, k) => {
  if (value === null) return '';
  if (!numeric.has(k)) return value;
  const digits = Number.isInteger(value) ? {} : {maximumSignificantDigits: 4};
  return value.toLocaleString('en-US', digits);
};

const compare = (a, b) => {
  const [x, y] = [a[order.by], b[order.by]];
  const none = (value) => value === null || value === '';
  if (none(x) || none(y)) return none(x) - none(y);
  const sign = order.up ? 1 : -1;
  if (numeric.has(order.by)) return (x - y) * sign;
  return String(x).localeCompare(String(y), 'en', {numeric: true}) * sign;
};

const sortBy = (k) => {
  order.up = order.by === k ? !order.up : k !== NEWEST_FIRST;
  order.by = k;
  draw();
  box.querySelectorAll('th button')[k].focus();
};

const choose = (line, name) => {
  chosen = name;
  box.querySelectorAll('[aria-current]').forEach((el) => { el.ariaCurrent = null; });
  line.ariaCurrent = 'true';
  trigger('click', {name});
};

const drawHead = (head) => headers.forEach((name, k) => {
  const cell = make('th');
  const sorted = order.by === k;
  const button = make('button', name + (sorted ? (order.up ? ' ↑' : ' ↓') : ''));
  cell.scope = 'col';
  if (numeric.has(k)) cell.className = 'number';
  cell.ariaSort = sorted ? (order.up ? 'ascending' : 'descending') : 'none';
  button.onclick = () => sortBy(k);
  cell.append(button);
  head.append(cell);
});

const drawRow = (line, row) => {
  if (row[0] === chosen) line.ariaCurrent = 'true';
  line.onclick = () => choose(line, row[0]);
  row.forEach((value, k) => {
    const cell = line.insertCell();
    if (numeric.has(k)) cell.className = 'number';
    cell.title = k === 0 || k === headers.length - 1 ? value : '';
    cell.append(k ? format(value, k) : make('button', value));
  });
};

const draw = () => {
  const table = make('table');
  drawHead(table.createTHead().insertRow());
  const body = table.createTBody();
  for (const row of order.by < 0 ? rows : [...rows].sort(compare)) drawRow(body.insertRow(), row);
  box.replaceChildren(table);
};

const read = () => {
  const found = JSON.parse(props.value || '{"headers": [], "numeric": [], "rows": []}');
  headers = found.headers;
  numeric = new Set(found.numeric);
  rows = found.rows;
  draw();
};
watch('value', read);
read();
