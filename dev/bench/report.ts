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
  /** A sample per round; NaN where it failed. */
  values: Partial<Record<Transport, { median: number; ratio: number | undefined; samples: number[] }>>;
}
export type Results = Record<string, Result>;

export interface Verdict {
  title: string;
  target: string;
  measured: string;
  verdict: "reached" | "missed" | "not measured";
}

/** Medians, and the medians of the rounds' ratios to the baseline. */
export function summarise(
  figures: Record<string, Figure>,
  samples: Map<string, Map<Transport, number[]>>,
  baseline: Transport,
): Results {
  const results: Results = {};
  for (const [name, figure] of Object.entries(figures)) {
    const row = samples.get(name);
    if (!row) continue;
    const base = (!figure.absolute && row.get(baseline)) || [];
    const values: Result["values"] = {};
    for (const [transport, samples] of row)
      values[transport] = { median: median(samples), ratio: pairwise(samples, base), samples };
    results[name] = { ...figure, values };
  }
  return results;
}

export function judge<Name extends string>(targets: Target<Name>[], results: Results): Verdict[] {
  return targets.map(({ title, figure, against, atLeast, atMost }) => {
    const own = results[figure]?.values.amqp0;
    const other =
      against &&
      (results[against] ?? results[figure])?.values[against in TRANSPORTS ? (against as Transport) : "amqp0"];
    const value = own && against ? pairwise(own.samples, other?.samples ?? []) : own?.median;
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

/** What one round measures beside the other on a busy machine says more than the medians of all rounds. */
function pairwise(samples: number[], base: number[]): number | undefined {
  const ratios = samples.map((sample, round) => sample / (base[round] ?? NaN)).filter(Number.isFinite);
  return ratios.length > 0 ? median(ratios) : undefined;
}

function median(values: number[]): number {
  const sorted = values.filter((value) => !Number.isNaN(value)).sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? (sorted[middle] ?? NaN) : ((sorted[middle - 1] ?? NaN) + (sorted[middle] ?? NaN)) / 2;
}

/** A page that holds every figure, whatever it says. */
export function page(note: string, results: Results, transports: Transport[], verdicts: Verdict[]): string {
  const samples = Object.values(results).flatMap(({ title, unit, values }) =>
    transports.flatMap((transport) => {
      const each = values[transport]?.samples.map((sample) => (Number.isNaN(sample) ? "failed" : format(sample, unit)));
      return each ? [[title, TRANSPORTS[transport], each.join(" · ")]] : [];
    }),
  );
  return `# Benchmark

${note}. Written by \`bun run bench --markdown dev/benchmark.md\`.

All rounds run in turn over all transports. The machine is shared and noisy: the ratio, the median of the rounds' own, says more
than the figure beside it. A dash: not measured there, or it failed.

## Figures

${table(results, transports)}
## Targets

${targetTable(verdicts)}
## Every round

${markdown([["figure", "of", "rounds"], ...samples])}`;
}

// ── The picture ──────────────────────────────────────────────────────────────────────────────────────────────────────

const PANELS = [
  { figure: "bursts", title: "Packets per second, 100 emits per turn" },
  { figure: "single", title: "Packets per second, one emit per turn" },
  { figure: "rooms", title: "Packets per second, 1,000 rooms in turn" },
  { figure: "loop", title: "200,000 emits in one loop until the last is there (less is better)" },
  { figure: "receiverCpu", title: "Receiver CPU per packet (less is better)" },
  { figure: "p50at500", title: "Median latency at 500 packets/s (less is better)" },
];
const BARS: Transport[] = ["amqp0", "before", "redis", "sharded", "streams", "amqplib"];
const STYLE = `
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 14px }
  .note { fill: #59636e; font-size: 12px }
  rect { fill: #8c959f }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .own rect { fill: #ff6600 }
  .own text { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .note { fill: #9198a1 }
    rect { fill: #6e7681 }
    .page { fill: #0d1117; stroke: #3d444d }
  }`;

/**
 * Horizontal bars, a panel per figure. An image follows the system's colour scheme, not the page's, so it brings a background
 * of its own and is legible on a light and on a dark page.
 */
export function chart(results: Results, note: string): string {
  const [width, label, bar, row, gap] = [840, 260, 430, 24, 34];
  let y = 10;
  const panels = PANELS.flatMap(({ figure, title }) => {
    const result = results[figure];
    if (!result) return [];
    const values = BARS.flatMap((transport) => {
      const value = result.values[transport]?.median;
      return value === undefined || !Number.isFinite(value) ? [] : [{ transport, value }];
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
  <rect class="page" x="0.5" y="0.5" width="${width - 1}" height="${y + 13}" rx="6"/>
  ${panels.join("\n  ")}
  <text class="note" x="${label}" y="${y + 2}">${note}</text>
</svg>
`;
}
