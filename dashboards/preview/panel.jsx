// One panel of a dashboard's JSON, drawn by Grafana's own components. Grafana publishes none for bar
// charts, so those alone are drawn here, with Grafana's colours, units and legend.
import {
  FieldConfigOptionsRegistry,
  FieldType,
  applyFieldOverrides,
  cacheFieldDisplayNames,
  dateTime,
  getFieldDisplayName,
  getFieldSeriesColor,
  standardTransformers,
  standardTransformersRegistry,
  toDataFrame,
  transformDataFrame,
} from '@grafana/data';
import { PanelChrome, TimeSeries, VizLegend, useTheme2 } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { useEffect, useState } from 'react';
import { lastValueFrom } from 'rxjs';

import { frames, transformed } from '../page/frames.js';
import { requireAgreement } from './agreement.js';

const transformers = new Map(Object.values(standardTransformers).map((found) => [found.id, found]));
standardTransformersRegistry.setInit(() =>
  [...transformers.values()].map((found) => ({
    id: found.id,
    name: found.name,
    transformation: () => Promise.resolve(found),
  }))
);

const OPTIONS = ['unit', 'min', 'max', 'decimals', 'thresholds', 'mappings', 'color'];
const CUSTOM = [
  'align', 'axisPlacement', 'axisSoftMax', 'cellOptions', 'drawStyle', 'fillOpacity', 'hideFrom', 'inspect',
  'lineInterpolation', 'lineStyle', 'lineWidth', 'pointSize', 'scaleDistribution', 'showPoints', 'spanNulls',
  'thresholdsStyle', 'width',
];
const registry = new FieldConfigOptionsRegistry(() => [
  ...OPTIONS.map((id) => option(id, id, false)),
  ...CUSTOM.map((path) => option(`custom.${path}`, path, true)),
]);
const LINE = {
  axisPlacement: 'auto',
  drawStyle: 'line',
  lineInterpolation: 'linear',
  pointSize: 5,
  scaleDistribution: { type: 'linear' },
  spanNulls: false,
};
const LETTER = 6.7; // px, of a bar's name, about
const TABLE = { align: 'auto', cellOptions: { type: 'auto' }, inspect: false };

function option(id, path, isCustom) {
  const same = (value) => value;
  return { id, path, name: id, isCustom, process: same, shouldApply: () => true, editor: null, override: null };
}

async function prepare(ask, panel, values, range, theme) {
  const answers = await frames(ask, panel, values, range);
  const transformations = panel.transformations ?? [];
  const data = await lastValueFrom(transformDataFrame(transformations, answers.map(toDataFrame)));
  if (transformations.length) {
    requireAgreement(transformed(transformations, answers), data);
  }
  const custom = panel.type === 'timeseries' ? LINE : TABLE;
  const { defaults, overrides } = panel.fieldConfig;
  const drawn = applyFieldOverrides({
    data,
    fieldConfig: { defaults: { ...defaults, custom: { ...custom, ...defaults.custom } }, overrides },
    fieldConfigRegistry: registry,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'browser',
  });
  cacheFieldDisplayNames(drawn);
  return drawn;
}

export function Panel({ ask, panel, values, range, width, height }) {
  const theme = useTheme2();
  const [data, setData] = useState();
  const [error, setError] = useState();
  useEffect(() => {
    prepare(ask, panel, values, range, theme).then(setData, (failure) => {
      console.error(`${panel.title}: ${failure.stack}`);
      setError(failure.message);
    });
  }, [ask, panel, values, range, theme]);
  const state = error ? 'error' : data ? 'drawn' : 'waiting';
  return (
    <section data-panel={panel.title} data-state={state} data-frames={data?.length ?? 0}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
        {(innerWidth, innerHeight) => {
          if (error) {
            return <p>{error}</p>;
          }
          if (!data?.length) {
            return <p>{data ? 'No data' : ''}</p>;
          }
          const Kind = { timeseries: Lines, barchart: Bars, table: Rows }[panel.type];
          return <Kind panel={panel} data={data} range={range} width={innerWidth} height={innerHeight} />;
        }}
      </PanelChrome>
    </section>
  );
}

function Lines({ panel, data, range, width, height }) {
  const [from, to] = [dateTime(1000 * range.from), dateTime(1000 * range.to)];
  return (
    <TimeSeries
      frames={data}
      timeRange={{ from, to, raw: { from, to } }}
      timeZone="browser"
      legend={panel.options.legend}
      options={panel.options}
      width={width}
      height={height}
    />
  );
}

function Rows({ data, width, height }) {
  return <TableNG data={data[0]} width={width} height={height} />;
}

function Bars({ panel, data, width, height }) {
  const theme = useTheme2();
  const frame = data[0];
  const names = frame.fields.find((field) => field.type === FieldType.string).values;
  const fields = frame.fields.filter((field) => field.type === FieldType.number);
  const stacked = panel.options.stacking === 'normal';
  const limit = panel.fieldConfig.defaults.thresholds.steps.at(-1);
  const left = Math.min(300, width / 2);
  const most = highest(fields, stacked, limit.value ?? 0);
  const scale = (width - left - 70) / most;
  const x = (value) => left + scale * value;
  const rowHeight = Math.max(8, (height - 56) / names.length);
  const axis = [0, most / 2, most].map((value) => [value, fields[0].display(value)]);
  const series = fields.map((field) => ({
    field,
    title: getFieldDisplayName(field, frame, data),
    colour: getFieldSeriesColor(field, theme).color,
  }));
  const inLegend = series.filter(({ field }) => !field.config.custom?.hideFrom?.legend);
  return (
    <>
      <svg width={width} height={height - 32} fill={theme.colors.text.primary} fontSize="11">
        {names.map((name, row) => (
          <g key={name} transform={`translate(0 ${row * rowHeight})`}>
            <text x={left - 8} y={rowHeight / 2 + 4} textAnchor="end">
              {shortened(name, left / LETTER)}
            </text>
            <Group series={series} row={row} stacked={stacked} x={x} height={rowHeight} />
          </g>
        ))}
        {axis.map(([value, { text, suffix = '' }]) => (
          <text key={value} x={x(value)} y={height - 40} textAnchor="middle" fill={theme.colors.text.secondary}>
            {text + suffix}
          </text>
        ))}
        {limit.value !== null && (
          <line
            x1={x(limit.value)}
            x2={x(limit.value)}
            y1="0"
            y2={height}
            stroke={theme.visualization.getColorByName(limit.color)}
            strokeDasharray="6 4"
          />
        )}
      </svg>
      <VizLegend
        displayMode="list"
        placement="bottom"
        items={inLegend.map(({ title, colour }) => ({ label: title, color: colour, yAxis: 1 }))}
      />
    </>
  );
}

/** The bars of one row: on top of one another where they are stacked, else below one another. */
function Group({ series, row, stacked, x, height }) {
  const thickness = (0.8 * height) / (stacked ? 1 : series.length);
  let before = 0;
  return series.map(({ field, title, colour }, place) => {
    const value = field.values[row];
    if (value === null || value === undefined) {
      return null;
    }
    const start = stacked ? before : 0;
    before += value;
    const y = 0.1 * height + (stacked ? 0 : place * thickness);
    const opacity = (field.config.custom?.fillOpacity ?? 80) / 100;
    const { text, suffix = '' } = field.display(value);
    return (
      <g key={title}>
        <rect
          x={x(start)}
          y={y}
          width={x(start + value) - x(start)}
          height={thickness}
          fill={colour}
          fillOpacity={opacity}
        />
        {!stacked && thickness > 8 && (
          <text x={x(value) + 4} y={y + thickness / 2 + 4}>
            {text + suffix}
          </text>
        )}
      </g>
    );
  });
}

function highest(fields, stacked, limit) {
  const rows = fields[0].values.map((_, row) => fields.map((field) => field.values[row] ?? 0));
  return Math.max(limit, ...rows.map((values) => (stacked ? values.reduce((sum, v) => sum + v) : Math.max(...values))));
}

const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
