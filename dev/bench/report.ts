/** What a run found, as Markdown and as a picture. */
import { TRANSPORTS, type Transport } from "./transports.ts";

export interface Figure {
  title: string;
  /** Empty for a count. */
  unit: string;
  /** Whether a ratio would say nothing: the others' figure is about zero. */
  absolute?: boolean;
}

/** What must hold: a figure of the adapter, as it is, or as a multiple of another transport's or of another figure. */
export interface Target<Name extends string> {
  title: string;
  figure: Name;
  against?: Transport | Name;
  atLeast?: number;
  atMost?: number;
}

export interface Result {
  title: string;
  unit: string;
  values: Partial<Record<Transport, { median: number; ratio: number | undefined; samples: number[] }>>;
}
export type Results = Record<string, Result>;

export interface Verdict {
  title: string;
  target: string;
  measured: string;
  verdict: "reached" | "missed" | "not measured";
}

/** Medians, and their ratios to the baseline's. */
export function summarise(
  figures: Record<string, Figure>,
  samples: Map<string, Map<Transport, number[]>>,
  baseline: Transport,
): Results {
  const results: Results = {};
  for (const [name, figure] of Object.entries(figures)) {
    const row = samples.get(name);
    if (!row) continue;
    const base = row.has(baseline) && !figure.absolute ? median(row.get(baseline) ?? []) : 0;
    const values: Result["values"] = {};
    for (const [transport, samples] of row)
      values[transport] = { median: median(samples), ratio: base > 0 ? median(samples) / base : undefined, samples };
    results[name] = { ...figure, values };
  }
  return results;
}

export function judge<Name extends string>(targets: Target<Name>[], results: Results): Verdict[] {
  return targets.map(({ title, figure, against, atLeast, atMost }) => {
    const own = results[figure]?.values.amqp0?.median;
    const other =
      against &&
      (results[against] ?? results[figure])?.values[against in TRANSPORTS ? (against as Transport) : "amqp0"]?.median;
    const value = own !== undefined && against ? own / (other ?? NaN) : own;
    const unit = against ? "×" : (results[figure]?.unit ?? "");
    const target = atLeast === undefined ? `at most ${format(atMost, unit)}` : `at least ${format(atLeast, unit)}`;
    if (value === undefined || Number.isNaN(value)) return { title, target, measured: "–", verdict: "not measured" };
    const reached = value >= (atLeast ?? -Infinity) && value <= (atMost ?? Infinity);
    return { title, target, measured: format(value, unit), verdict: reached ? "reached" : "missed" };
  });
}

/** A row per figure: the ratio to the baseline, and the absolute beside it. */
export function table(results: Results, transports: Transport[]): string {
  const cell = ({ unit, values }: Result, transport: Transport): string => {
    const value = values[transport];
    if (!value || Number.isNaN(value.median)) return "–";
    const absolute = format(value.median, unit);
    return value.ratio === undefined ? absolute : `${format(value.ratio, "×")} · ${absolute}`;
  };
  return markdown([
    ["figure", ...transports.map((transport) => TRANSPORTS[transport])],
    ...Object.values(results).map((result) => [
      result.title,
      ...transports.map((transport) => cell(result, transport)),
    ]),
  ]);
}

export function targetTable(verdicts: Verdict[]): string {
  return markdown([
    ["figure", "target", "measured", ""],
    ...verdicts.map(({ title, target, measured, verdict }) => [title, target, measured, verdict]),
  ]);
}

function markdown([head = [], ...rows]: string[][]): string {
  const widths = head.map((_, i) => Math.max(3, ...[head, ...rows].map((row) => row[i]?.length ?? 0)));
  const line = (row: string[]) => `| ${row.map((cell, i) => cell.padEnd(widths[i] ?? 0)).join(" | ")} |`;
  return [line(head), line(widths.map((width) => "-".repeat(width))), ...rows.map(line), ""].join("\n");
}

function format(value: number | undefined, unit: string): string {
  if (value === undefined) return "–";
  const digits = new Intl.NumberFormat(
    "en",
    Math.abs(value) < 1 ? { maximumSignificantDigits: 2 } : { maximumSignificantDigits: 3 },
  );
  return `${digits.format(value)}${unit.startsWith("/") ? "" : " "}${unit}`.trim();
}

function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? (sorted[middle] ?? NaN) : ((sorted[middle - 1] ?? NaN) + (sorted[middle] ?? NaN)) / 2;
}

// ── The picture ──────────────────────────────────────────────────────────────────────────────────────────────────────

const PANELS = [
  { figure: "bursts", title: "Packets per second, 100 emits per turn" },
  { figure: "single", title: "Packets per second, one emit per turn" },
  { figure: "receiverCpu", title: "Receiver CPU per packet (less is better)" },
  { figure: "p50at500", title: "Median latency at 500 packets/s (less is better)" },
];
const BARS: Transport[] = ["amqp0", "redis", "sharded", "streams", "amqplib"];
const STYLE = `
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 14px }
  .note { fill: #59636e; font-size: 12px }
  rect { fill: #afb8c1 }
  .own rect { fill: #ff6600 }
  .own text { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .note { fill: #9198a1 }
    rect { fill: #57606a }
  }`;

/** Horizontal bars, a panel per figure, legible on a light and on a dark page. */
export function chart(results: Results, note: string): string {
  const [width, label, bar, row, gap] = [840, 260, 430, 24, 34];
  let y = 8;
  const panels = PANELS.flatMap(({ figure, title }) => {
    const result = results[figure];
    if (!result) return [];
    const values = BARS.flatMap((transport) => {
      const value = result.values[transport]?.median;
      return value === undefined ? [] : [{ transport, value }];
    });
    const longest = Math.max(...values.map(({ value }) => value));
    const heading = `<text class="title" x="${label}" y="${(y += 16)}">${title}</text>`;
    const bars = values.map(({ transport, value }) => {
      const length = Math.max(1, (value / longest) * bar).toFixed(1);
      const top = (y += transport === values[0]?.transport ? 10 : row);
      return `<g${transport === "amqp0" ? ' class="own"' : ""}>
    <text x="${label - 10}" y="${top + 14}" text-anchor="end">${TRANSPORTS[transport]}</text>
    <rect x="${label}" y="${top}" width="${length}" height="18" rx="2"/>
    <text x="${label + Number(length) + 8}" y="${top + 14}">${format(value, result.unit)}</text>
  </g>`;
    });
    y += row + gap - 16;
    return [heading, ...bars];
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${y + 14}" width="${width}" role="img">
  <title>Benchmark of Socket.IO adapters</title>
  <style>${STYLE}
  </style>
  ${panels.join("\n  ")}
  <text class="note" x="${label}" y="${y + 2}">${note}</text>
</svg>
`;
}
