// A committed dashboard against a Prometheus, in a browser: no Grafana server. The address chooses:
// ?board=compare&lab=..&run=..&from=<unix s>&to=<unix s>; what is left out is the first choice there.
import { createTheme } from '@grafana/data';
import { GlobalStyles, PortalContainer, ThemeContext } from '@grafana/ui';
import { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';

import { choices, prometheus } from '../page/frames.js';
import { Panel } from './panel.jsx';

const BOARDS = Object.fromEntries(
  Object.entries(import.meta.glob('../grafana/*.json', { eager: true, import: 'default' })).map(
    ([path, board]) => [path.split('/').at(-1).replace('.json', ''), board]
  )
);
const asked = new URLSearchParams(location.search);
const name = asked.get('board') ?? 'lab-live';
const board = BOARDS[name];
const theme = createTheme({ colors: { mode: asked.get('theme') ?? 'dark' } });
const to = Number(asked.get('to') ?? Date.now() / 1000);
const range = { from: Number(asked.get('from') ?? to - 900), to };
const ask = prometheus('/prometheus');
const CELL = 30; // px of a grid row's height, without the gap
const GAP = 8;
const SELECT = {
  appearance: 'auto',
  background: theme.colors.background.secondary,
  color: theme.colors.text.primary,
  height: 28,
  width: 'auto',
};

function choose(parameter, value) {
  asked.set(parameter, value);
  location.search = asked;
}

function Choice({ label, parameter, options, value }) {
  return (
    <label style={{ marginRight: 16 }}>
      {label}{' '}
      <select style={SELECT} value={value} onChange={(event) => choose(parameter, event.target.value)}>
        {options.map((option) => (
          <option key={option}>{option}</option>
        ))}
      </select>
    </label>
  );
}

function Board() {
  const [chosen, setChosen] = useState();
  useEffect(() => {
    (async () => {
      const found = {};
      const values = {};
      for (const variable of board.templating.list) {
        const options = await choices(ask, variable, values);
        found[variable.name] = options;
        values[variable.name] = asked.get(variable.name) ?? options[0];
      }
      setChosen({ found, values });
    })();
  }, []);
  if (!chosen) {
    return null;
  }
  const column = (document.documentElement.clientWidth - 2 * GAP) / 24;
  return (
    <main style={{ padding: GAP }}>
      <nav>
        <Choice label="Dashboard" parameter="board" options={Object.keys(BOARDS)} value={name} />
        {board.templating.list.map((variable) => (
          <Choice
            key={variable.name}
            label={variable.label}
            parameter={variable.name}
            options={chosen.found[variable.name]}
            value={chosen.values[variable.name]}
          />
        ))}
      </nav>
      <h1 style={{ fontSize: 20, margin: GAP }}>{board.title}</h1>
      <div style={{ position: 'relative' }}>
        {board.panels.map((panel) => {
          const { x, y, w, h } = panel.gridPos;
          const place = { position: 'absolute', left: x * column, top: y * (CELL + GAP) };
          if (panel.type === 'row') {
            return (
              <h2 key={panel.id} style={{ ...place, fontSize: 16 }}>
                {panel.title}
              </h2>
            );
          }
          return (
            <div key={panel.id} style={place}>
              <Panel
                ask={ask}
                panel={panel}
                values={chosen.values}
                range={range}
                width={w * column - GAP}
                height={h * (CELL + GAP) - GAP}
              />
            </div>
          );
        })}
      </div>
    </main>
  );
}

createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <PortalContainer />
    <Board />
  </ThemeContext.Provider>
);
