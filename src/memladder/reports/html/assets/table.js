const over = (row) => (row.bytes === null || row.base === null || row.budget === null ? null : row.bytes - row.base - row.budget);
const COLUMNS = [
  ['store', 'store', (row) => data.stores[row.store]], ['id', 'case', (row) => row.id], ['model', 'model', (row) => row.model],
  ['framework', 'framework', (row) => row.framework], ['workload', 'workload', (row) => row.workload],
  ['scope', 'scope', (row) => row.scope], ['precision', 'weights', (row) => row.precision],
  ['device', 'device', (row) => row.device], ['status', 'status', (row) => (row.problem ? `${row.status}, ${row.problem}` : row.status)],
  ['bytes', 'bytes', (row) => row.bytes, true], ['net', 'net of context', (row) => (row.bytes === null || row.base === null ? null : row.bytes - row.base), true],
  ['peak', 'peak', (row) => row.peak, true], ['predicted', 'predicted', (row) => row.predicted, true],
  ['budget', 'budget', (row) => row.budget, true], ['over', 'over budget', over, true], ['published', 'published', (row) => row.published, true],
  ['noise', 'noise', (row) => row.noise, true], ['runs', 'runs', (row) => row.runs], ['reason', 'reason', (row) => row.reason],
];
const HIDDEN_COLUMNS = new Set(['model', 'framework', 'workload', 'reason', 'runs']);
// Of these a column that says the same everywhere is left out.
const MAY_REPEAT = new Set(['store', 'scope', 'device']);
let sorted = { column: null, down: false };

function tableRows() {
  const indices = visible();
  if (sorted.column === null) return indices;
  const read = COLUMNS[sorted.column][2], sign = sorted.down ? -1 : 1;
  const known = (value) => value !== null && value !== undefined;
  // What has no number stays last, whichever way the others go.
  return indices.sort((a, b) => {
    const one = read(data.rows[a]), two = read(data.rows[b]);
    if (!known(one) || !known(two)) return Number(!known(one)) - Number(!known(two)) || a - b;
    return (typeof one === 'number' ? one - two : one.localeCompare(two, 'en', { numeric: true })) * sign || a - b;
  });
}

function drawTable() {
  const shownColumns = COLUMNS.map((column, place) => [column, place]).filter(([column]) =>
    !HIDDEN_COLUMNS.has(column[0]) && !(MAY_REPEAT.has(column[0]) && new Set(data.rows.map(column[2])).size < 2));
  const head = make('tr', {}, ...shownColumns.map(([[, title, , right], place]) => {
    const mine = sorted.column === place;
    const th = make('th', { scope: 'col', class: right ? 'number' : '', 'aria-sort': mine ? (sorted.down ? 'descending' : 'ascending') : 'none' },
      make('button', { type: 'button', 'data-column': place, onclick: () => {
        sorted = { column: place, down: mine ? !sorted.down : false };
        drawTable();
        document.querySelector(`[data-column="${place}"]`).focus();
      } }, `${title}${mine ? (sorted.down ? ' ↓' : ' ↑') : ''}`));
    return th;
  }));
  const body = make('tbody', {}, ...tableRows().map((index) => {
    const row = data.rows[index];
    return make('tr', {}, ...shownColumns.map(([[key, , read, right]]) => {
      const found = read(row);
      if (key === 'id') return make('th', { scope: 'row' }, make('button', { type: 'button', class: 'link', onclick: () => openCell(index) }, found));
      return make('td', { class: right ? 'number' : '' }, right ? mib(found) : found ?? '');
    }));
  }));
  $('cells').replaceChildren(make('thead', {}, head), body);
}

// A spreadsheet takes what starts so for a formula; an apostrophe makes it text.
const FORMULA = /^[=+\-@\t\r\n]/;
function csvField(value) {
  if (value === null || value === undefined) return '';
  if (typeof value === 'number') return String(value);
  const plain = escaped(value).replace(/[\t\n]+/g, ' ');
  const text = FORMULA.test(value) || FORMULA.test(plain) ? `'${plain}` : plain;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
const toCsv = () => [COLUMNS.map(([key]) => key), ...tableRows().map((index) => COLUMNS.map(([, , read]) => read(data.rows[index])))]
  .map((line) => line.map(csvField).join(',')).join('\n') + '\n';
const toJson = () => JSON.stringify(tableRows().map((index) =>
  Object.fromEntries(COLUMNS.map(([key, , read]) => [key, read(data.rows[index]) ?? null]))), null, 1) + '\n';

function listenToTable() {
  $('csv').addEventListener('click', () => save('memladder.csv', 'text/csv;charset=utf-8', toCsv()));
  $('json').addEventListener('click', () => save('memladder.json', 'application/json', toJson()));
}
