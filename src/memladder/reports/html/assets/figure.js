const FILTERS = [
  ['model', 'Model', (row) => row.modelTitle], ['workload', 'Workload', (row) => row.workload],
  ['scope', 'Scope', (row) => row.scope], ['system', 'Framework', (row) => row.system],
  ['precision', 'Weights', (row) => row.precision], ['status', 'Status', (row) => row.status],
  ['store', 'Store', (row) => data.stores[row.store]],
];
const wanted = new Map(FILTERS.map(([key]) => [key, new Set()]));
const MOST_ROWS = 240;
let mostRows = MOST_ROWS;

// Numbers of the rows that the filters leave.
const visible = () => data.rows.map((_, index) => index).filter((index) =>
  FILTERS.every(([key, , read]) => !wanted.get(key).size || wanted.get(key).has(read(data.rows[index]))));

function drawFilters(redraw) {
  for (const [key, title, read] of FILTERS) {
    const values = [...new Set(data.rows.map(read))];
    if (values.length < 2) continue;
    const name = make('summary', {}, `${title}: all`);
    const boxes = make('div', { role: 'group', 'aria-label': title });
    const whole = make('details', { class: 'filter', id: `filter-${key}` }, name, boxes);
    for (const value of values) {
      const box = make('input', { type: 'checkbox', value, onchange: () => {
        const chosen = wanted.get(key);
        box.checked ? chosen.add(value) : chosen.delete(value);
        name.textContent = `${title}: ${chosen.size === 0 ? 'all' : chosen.size === 1 ? escaped([...chosen][0]) : chosen.size}`;
        whole.classList.toggle('on', chosen.size > 0);
        mostRows = MOST_ROWS;
        redraw();
      } });
      boxes.append(make('label', {}, box, value));
    }
    $('filters').append(whole);
  }
  if (!$('filters').children.length) $('filters').hidden = true;
  document.addEventListener('click', (event) => {
    for (const open of document.querySelectorAll('.filter[open]')) if (!open.contains(event.target)) open.open = false;
  });
  document.addEventListener('keydown', (event) => {
    const open = event.key === 'Escape' && document.querySelector('.filter[open]');
    if (open) { open.open = false; open.firstChild.focus(); }
  });
}

function value(row) {
  if (missing(row)) return null;
  if (!$('net').checked) return row.bytes;
  return row.base === null ? null : row.bytes - row.base;
}

// What a cell is held against: its budget, and the context where that is drawn too.
function budgetOf(row) {
  if (row.budget === null || $('net').checked) return row.budget;
  return row.base === null ? null : row.budget + row.base;
}

const NARROW = matchMedia('(max-width: 640px)');

function scaleOf(rows) {
  const overlay = (row) => [
    $('published').checked && !$('net').checked ? row.published : null,
    $('predicted').checked && !$('net').checked ? row.high : null,
    $('budget').checked ? budgetOf(row) : null,
  ];
  const sizes = rows.flatMap((row) => [value(row), ...overlay(row)]).filter((size) => size > 0);
  const most = Math.max(...sizes, MIB), least = Math.min(...sizes, most);
  if ($('log').checked) {
    const low = 10 ** Math.floor(Math.log10(least / MIB)) * MIB;
    const high = Math.max(most * 1.02, low * 10), span = Math.log(high / low);
    const ticks = [];
    for (let decade = low; decade <= high; decade *= 10) {
      for (const step of [1, 2, 5]) if (step * decade <= high && (step === 1 || (span < 7 && !NARROW.matches))) ticks.push(step * decade);
    }
    return { at: (bytes) => Math.max(0, (100 * Math.log(bytes / low)) / span), ticks };
  }
  const rough = most / MIB / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((one) => one * power >= rough) * power * MIB;
  const ticks = [];
  for (let tick = 0; tick <= most * 1.02; tick += step) ticks.push(tick);
  return { at: (bytes) => (100 * bytes) / (most * 1.02), ticks };
}

const place = (name, left, width) => {
  const mark = make('i', { class: name });
  mark.style.left = `${left}%`;
  if (width !== undefined) mark.style.width = `${width}%`;
  return mark;
};

function track(row, size, scale) {
  const whole = make('span', { class: 'track', 'aria-hidden': 'true' }, ...scale.ticks.map((tick) => place('gridline', scale.at(tick))));
  const net = $('net').checked;
  if (size > 0) {
    const bar = make('i', { class: `bar ${row.status} ${row.store % 2 ? 'second' : 'first'}` });
    bar.style.width = `${Math.max(scale.at(size), 0.2)}%`;
    whole.append(bar);
  }
  if ($('budget').checked && budgetOf(row) !== null) whole.append(place('floor', scale.at(budgetOf(row))));
  if ($('predicted').checked && !net && row.low) {
    whole.append(place('interval', scale.at(row.low), scale.at(row.high) - scale.at(row.low)));
  }
  if ($('published').checked && !net && row.published) whole.append(place('published', scale.at(row.published)));
  if (size === null) {
    whole.append(make('span', { class: 'why' }, missing(row) ?? 'its context is not known'));
  }
  return whole;
}

function spoken(row, size) {
  const parts = [label(row), row.modelTitle, row.workload];
  parts.push(size === null ? missing(row) ?? 'context not known' : `${sized(size)}, ${STATUS[row.status]}`);
  if (row.published && $('published').checked) parts.push(`published ${sized(row.published)}`);
  if (row.predicted) parts.push(`predicted ${sized(row.predicted)}`);
  return escaped(parts.join(', '));
}

function drawRow(index, scale) {
  const row = data.rows[index], size = value(row);
  const button = make('button', {
    type: 'button', class: 'row', 'data-index': index, 'aria-label': spoken(row, size), 'aria-haspopup': 'dialog',
  }, make('span', { class: 'name' }, label(row)), track(row, size, scale),
  make('span', { class: 'value' }, size === null ? '–' : `${mib(size)} MiB`));
  return make('li', {}, button);
}

function drawLegend(rows) {
  const looks = ['measured', 'planned', 'predicted'].filter((look) => rows.some((row) => row.status === look && !missing(row)));
  const key = (look, text, more = 'first') => make('span', {}, make('i', { class: `key ${look} ${more}` }), text);
  const parts = looks.map((look) => key(look, STATUS[look]));
  if (data.stores.length > 1) data.stores.forEach((name, index) => parts.push(key('measured', name, index % 2 ? 'second' : 'first')));
  const net = $('net').checked;
  if ($('published').checked && !net && rows.some((row) => row.published)) parts.push(key('published', data.publishedName));
  if ($('predicted').checked && !net) parts.push(key('interval', 'predicted, 19 of 20'));
  if ($('budget').checked) parts.push(key('floor', `${net ? '' : 'context and '}budget: weights in the format, cache, activations`));
  if (net) parts.push(make('span', {}, 'without CUDA’s context, or imported libraries on the CPU; published and predicted totals are hidden'));
  $('legend').replaceChildren(...parts);
}

function drawFigure() {
  const all = visible();
  const indices = all.slice(0, mostRows);
  const rows = indices.map((index) => data.rows[index]);
  const scale = scaleOf(rows);
  const groups = new Map();
  for (const index of indices) {
    const row = data.rows[index];
    const name = `${row.modelTitle}, ${row.workload}, ${row.scope}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(index);
  }
  const drawn = [];
  for (const [name, members] of groups) {
    if ($('order').value === 'bytes') members.sort((a, b) => (value(data.rows[a]) ?? Infinity) - (value(data.rows[b]) ?? Infinity));
    const axis = make('div', { class: 'axis', 'aria-hidden': 'true' }, make('div', {}, ...scale.ticks.map((tick) => {
      const text = make('span', {}, number(tick / MIB, tick && tick < MIB ? 2 : 0) + (tick === scale.ticks[0] ? ' MiB' : ''));
      text.style.left = `${scale.at(tick)}%`;
      return text;
    })));
    drawn.push(make('div', { class: 'group' }, make('h3', {}, name),
      make('ul', { class: 'bars' }, ...members.map((index) => drawRow(index, scale))), axis));
  }
  $('chart').replaceChildren(...drawn);
  drawLegend(rows);
  $('count').textContent = `${all.length} of ${data.rows.length} cells` + (all.length > indices.length ? `, the first ${indices.length} drawn` : '');
  $('more').hidden = all.length <= indices.length;
  $('more').textContent = `Draw all ${all.length}`;
}
