function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  $('theme').setAttribute('aria-pressed', String(dark));
}

function start() {
  const wish = matchMedia('(prefers-color-scheme: dark)');
  setTheme(wish.matches);
  wish.addEventListener('change', () => setTheme(wish.matches));
  $('theme').addEventListener('click', () => setTheme(document.documentElement.dataset.theme !== 'dark'));
  const devices = [...new Set(data.rows.map((row) => row.device))];
  $('about').append(shown(`${data.rows.length} cells; ${devices.slice(0, 4).join('; ')}${devices.length > 4 ? '; …' : ''}`));
  $('foot').append(`Made by memladder ${data.version}. Sizes are bytes of a process on its device while it works; measured, planned and predicted are different words. Everything is in this file: it asks nothing of any network.`);
  $('published-label').hidden = !data.rows.some((row) => row.published);
  const redraw = () => { drawFigure(); drawTable(); };
  drawFilters(redraw);
  for (const id of ['log', 'net', 'published', 'predicted', 'budget', 'order']) $(id).addEventListener('change', drawFigure);
  NARROW.addEventListener('change', drawFigure);
  $('more').addEventListener('click', () => { mostRows = Infinity; drawFigure(); });
  listenToCells();
  drawFigure();
  performance.mark('figure');
  // The rest comes after the figure is on the screen.
  requestAnimationFrame(() => setTimeout(() => {
    drawTable();
    listenToTable();
    drawComparison();
    drawForm();
    document.documentElement.dataset.ready = 'yes';
  }));
}

// For tests, and for whoever looks.
globalThis.memladder = { data, details, answers, toCsv, toJson };
start();
