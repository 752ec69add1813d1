/** A TCP proxy in front of a broker that fails as networks do: refuses, goes silent, is slow. */
import { connect, createServer, type AddressInfo, type Socket } from "node:net";

export type Role = "consuming" | "publishing";

/** A link that carries `basic.consume` (class 60, method 20) is the consuming one. */
const CONSUME = Buffer.from([0, 60, 0, 20]);
const STALL = 500;

interface Link {
  readonly client: Socket;
  readonly upstream: Socket;
  role: Role;
  /** Half-open: nothing passes any more, neither bytes nor the end of either side. */
  dark: boolean;
}

export class Proxy {
  /** Connections that were tried, refused ones too. */
  attempts = 0;
  /** Milliseconds that every chunk takes in each direction, and how often one stalls for half a second. */
  latency = 0;
  stalls = 0;
  #refuses = false;
  readonly #links = new Set<Link>();
  readonly #server = createServer({ noDelay: true }, (client) => this.#accept(client));

  private constructor(readonly target: number) {}

  static open(target: number): Promise<Proxy> {
    const proxy = new Proxy(target);
    return new Promise((resolve) => proxy.#server.listen(0, "127.0.0.1", () => resolve(proxy)));
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** The local ports by which the broker knows the links. */
  ports(role?: Role): number[] {
    return this.#of(role).flatMap(({ upstream }) => upstream.localPort ?? []);
  }

  /** Drops the links and refuses new ones until `heal()`. */
  cut(role?: Role): void {
    this.#refuses = true;
    for (const { client, upstream } of this.#of(role)) {
      client.destroy();
      upstream.destroy();
    }
  }

  /** The links of now swallow everything from here on; new ones work. */
  silence(role?: Role): void {
    for (const link of this.#of(role)) link.dark = true;
  }

  heal(): void {
    this.#refuses = false;
  }

  close(): void {
    this.#server.close();
    this.cut();
  }

  #of(role?: Role): Link[] {
    return [...this.#links].filter((link) => !role || link.role === role);
  }

  #accept(client: Socket): void {
    this.attempts++;
    if (this.#refuses) return void client.resetAndDestroy();
    const upstream = connect({ port: this.target, host: "127.0.0.1", noDelay: true });
    const link: Link = { client, upstream, role: "publishing", dark: false };
    this.#links.add(link);
    client.on("data", (chunk: Buffer) => {
      if (chunk.includes(CONSUME)) link.role = "consuming";
    });
    this.#pass(link, client, upstream);
    this.#pass(link, upstream, client);
  }

  #pass(link: Link, from: Socket, to: Socket): void {
    let due = 0;
    const late: (() => void)[] = [];
    // Each timer does what has waited longest, so chunks keep their order whatever the timers do.
    const pass = (action: () => void) => {
      const now = performance.now();
      due = Math.max(due, now + this.latency + (Math.random() < this.stalls ? STALL : 0));
      if (due <= now && late.length === 0) return action();
      late.push(action);
      setTimeout(() => late.shift()?.(), due - now);
    };
    const unlessDark = (action: () => void) => () => {
      if (!link.dark) action();
    };
    from.on("data", (chunk: Buffer) =>
      pass(
        unlessDark(() => {
          if (!to.write(chunk)) from.pause();
        }),
      ),
    );
    to.on("drain", () => from.resume());
    from.on("error", () => {}); // "close" follows
    from.on("close", () => {
      pass(unlessDark(() => void to.end()));
      if (to.destroyed) this.#links.delete(link);
    });
  }
}
