/** Clients that lose their connection and come back. How tests are made: see fixture.ts. */
import { connect } from "amqplib";
import { describe, expect, spyOn, test } from "bun:test";
import { type Socket } from "socket.io";
import { Manager, type Socket as ClientSocket } from "socket.io-client";
import * as msgpack from "socket.io-msgpack-parser";
import {
  acquainted,
  adapterOf,
  amqpConnection,
  bindingLate,
  bindings,
  broker,
  child,
  closers,
  cluster,
  errorsOf,
  eventually,
  join,
  milliseconds,
  nothingIsLeft,
  prefix,
  queues,
  received,
  settled,
  start,
  tampered,
  useBroker,
  type ClientOptions,
  type Host,
  type HostOptions,
  type Options,
  type Pass,
} from "./fixture";
import { Proxy } from "./proxy";
import { createEmitter } from "../index";

useBroker();

describe("connection state recovery", () => {
  /** Servers that keep sessions. */
  const recovering = (options?: Options, server?: HostOptions) =>
    cluster({ requestsTimeout: 2_000, ...options }, { connectionStateRecovery: {}, ...server });

  /** A client that can be lost, and come back to any server. */
  class Guest {
    readonly client: ClientSocket;
    readonly heard: unknown[][] = [];
    readonly #nsp: string;

    constructor({ port }: { port: number }, nsp = "/", options: ClientOptions = {}) {
      this.#nsp = nsp;
      const url = `http://127.0.0.1:${port}`;
      this.client = new Manager(url, { transports: ["websocket"], reconnection: false, ...options }).socket(nsp);
      closers.unshift(() => this.client.disconnect());
      // Without the offset, which comes last.
      this.client.onAny((...event: unknown[]) => this.heard.push(event.slice(0, -1)));
    }

    static async at(host: Host, rooms: string[] = [], nsp = "/", options: ClientOptions = {}): Promise<Guest> {
      const guest = new Guest(host, nsp, options);
      await guest.connected();
      const socket = guest.on(host);
      await socket.join(rooms);
      const first = received(guest.client, "welcome");
      socket.emit("welcome");
      await first;
      guest.heard.length = 0;
      return guest;
    }

    on({ io }: Host): Socket {
      const socket = io.of(this.#nsp).sockets.get(this.client.id ?? "");
      if (!socket) throw new Error(`no socket ${this.client.id}`);
      return socket;
    }

    async connected(): Promise<void> {
      await received(this.client, "connect");
    }

    /** Loses its connection. */
    async leave(): Promise<void> {
      const lost = received(this.client, "disconnect");
      this.client.io.engine.close();
      await lost;
    }

    /** Comes back to a server; whether that knows it. */
    async back({ port }: { port: number }): Promise<boolean> {
      Object.assign(this.client.io, { uri: `http://127.0.0.1:${port}` });
      const connected = this.connected();
      this.client.connect();
      await connected;
      return this.client.recovered;
    }

    get numbers(): unknown[] {
      return this.heard.map(([, number]) => number);
    }
  }

  const noticed = ({ io }: Host) => eventually(() => expect(io.of("/").sockets.size).toBe(0));
  const bySender = (heard: unknown[][], sender: string) =>
    heard.filter(([, from]) => from === sender).map(([, , number]) => number);

  test.each([
    ["its own server", 0],
    ["another server", 1],
  ])("gives a client that comes back to %s its id, rooms, data and what it missed", async (_, to) => {
    const nodes = await recovering();
    const [a, b, c] = nodes;
    const guest = await Guest.at(a, ["red", "blue"]);
    const { id } = guest.client;
    guest.on(a).data = { name: "ann" };
    await guest.leave();
    await noticed(a);
    const emitter = createEmitter({ amqpConnection, prefix });
    closers.push(() => emitter.close());
    await emitter.ready;
    const emits: ((n: number) => unknown)[] = [
      (n) => b.io.emit("n", n),
      (n) => a.io.to("red").emit("n", n, { deep: Buffer.from("x") }),
      (n) => c.io.to(["red", "blue"]).emit("n", n),
      (n) => b.io.to(id ?? "").emit("n", n),
      (n) => b.io.to("blue").except("green").emit("n", n),
      (n) => emitter.to("red").emit("n", n),
    ];
    for (const [n, emit] of emits.entries()) {
      emit(n);
      await eventually(() => expect(a.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
      await eventually(() => expect(b.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
      await eventually(() => expect(c.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    }
    for (const { io } of [a, b]) {
      io.to("red").except("blue").emit("not for it");
      io.to("green").emit("not for it");
      io.volatile.emit("not for it");
      io.of("/chat").emit("not for it");
    }
    for (const { io } of [a, b]) await io.fetchSockets(); // what was emitted before has come
    const node = nodes[to] ?? a;
    await settled();
    expect(await guest.back(node)).toBe(true);
    expect(guest.client.id).toBe(id);
    const socket = guest.on(node);
    expect([socket.data, [...socket.rooms].toSorted()]).toEqual([{ name: "ann" }, ["blue", id, "red"].toSorted()]);
    c.io.to("blue").emit("n", 6);
    await eventually(() => expect(guest.numbers).toEqual([0, 1, 2, 3, 4, 5, 6]));
    expect(guest.heard[1]?.[2]).toEqual({ deep: Buffer.from("x") });
  });

  test("is exact while several servers emit and clients come back to any of them again and again", async () => {
    const nodes = await recovering();
    const guests = await Promise.all(Array.from({ length: 6 }, (_, i) => Guest.at(nodes[i % 3] ?? nodes[0], ["red"])));
    const over = Promise.withResolvers<void>();
    const emitting = nodes.map(async ({ io }, sender) => {
      let number = 0;
      let isOver = false;
      void over.promise.then(() => (isOver = true));
      for (; !isOver; await Bun.sleep(4)) io.to("red").emit("n", String(sender), number++);
      return number;
    });
    let recovered = 0;
    await Promise.all(
      guests.map(async (guest, g) => {
        for (let i = 0; i < 10; i++) {
          await guest.leave();
          await Bun.sleep((g * 7 + i * 13) % 40);
          const isKnown = await guest.back(nodes[(g + i) % 3] ?? nodes[0]);
          recovered += Number(isKnown);
        }
      }),
    );
    over.resolve();
    const counts = await Promise.all(emitting);
    expect(recovered).toBe(60);
    for (const { heard } of guests)
      for (const [sender, count] of counts.entries()) {
        await eventually(() => expect(bySender(heard, String(sender)).at(-1)).toBe(count - 1), 5_000);
        const numbers = bySender(heard, String(sender));
        expect(numbers).toEqual(Array.from({ length: count - Number(numbers[0]) }, (_, i) => Number(numbers[0]) + i));
      }
  }, 20_000);

  /** What a client presents when it comes back. */
  interface Ticket {
    pid: string;
    offset: string;
  }
  function ticketOf({ client }: Guest): Ticket {
    const { _pid: pid, _lastOffset: offset } = client as unknown as { _pid: string; _lastOffset: string };
    return { pid, offset };
  }

  /** Connects as a client that presents this; gives the id that it gets. */
  async function present({ port }: { port: number }, auth: Partial<Ticket>, options: ClientOptions = {}) {
    const url = `http://127.0.0.1:${port}`;
    const manager = new Manager(url, { transports: ["websocket"], reconnection: false, ...options });
    const client = manager.socket("/", { auth });
    closers.unshift(() => client.disconnect());
    await received(client, "connect");
    return client.id;
  }

  test("takes a client back that is there before its old server has noticed the loss", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    const { id = "" } = guest.client;
    guest.on(a).data = { name: "ann" };
    expect(await present(b, ticketOf(guest))).toBe(id);
    expect([a.io.of("/").sockets.has(id), b.io.of("/").sockets.get(id)?.data]).toEqual([false, { name: "ann" }]);
  });

  test("takes a client back to a server that has just started", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    b.io.to("red").emit("n", 1);
    const d = await start({}, { connectionStateRecovery: {} });
    expect(await guest.back(d)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
    await guest.leave();
    await noticed(d);
    await d.io.close(); // hands the session over
    const e = await start({}, { connectionStateRecovery: {} });
    expect(await guest.back(e)).toBe(true);
  });

  test("takes a session over however late the answer comes, for by then it is nowhere else", async () => {
    const link = await Proxy.open(broker.port);
    const amqpConnection = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b] = await Promise.all([
      start({ amqpConnection }, { connectionStateRecovery: {} }),
      start({ requestsTimeout: 400 }, { connectionStateRecovery: {} }),
    ]);
    closers.push(async () => {
      await a.adapter.close();
      link.close();
    });
    await acquainted([a, b]);
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1);
    const { onMessage } = a.adapter;
    a.adapter.onMessage = (message, origin) => {
      if (message.type === "claim") link.latency = 500;
      onMessage.call(a.adapter, message, origin);
    };
    expect(await guest.back(b)).toBe(true);
    link.latency = 0;
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("hands over once what many clients of a server have missed, though they came from another one just before", async () => {
    const server = { connectionStateRecovery: {} };
    const [a, b] = await Promise.all([start({}, server), start({}, server)]);
    await acquainted([a, b]);
    const guests = await Promise.all(Array.from({ length: 10 }, () => Guest.at(a, ["red"])));
    const lose = async (node: Host) => {
      await Promise.all(guests.map((guest) => guest.leave()));
      await noticed(node);
    };
    const comeBack = async (node: Host, count: number) => {
      const recovered = await Promise.all(guests.map((guest) => guest.back(node)));
      expect(recovered).not.toContain(false);
      const numbers = Array.from({ length: count }, (_, n) => n);
      await eventually(() => expect(guests.map((guest) => guest.numbers)).toEqual(guests.map(() => numbers)));
    };
    await lose(a);
    b.io.to("red").emit("n", 0);
    await comeBack(b, 1);
    for (let n = 1; n < 50; n++) b.io.to("red").emit("n", n);
    await lose(b);
    b.io.to("red").emit("n", 50);
    const answered = spyOn(a.adapter, "onMessage");
    await b.io.close();
    const items = answered.mock.calls.flatMap(([message]) => (message.type === "items" ? message.items : []));
    await comeBack(a, 51);
    expect(items.length).toBeLessThan(200); // the sessions twice, 50 packets, and the first one for each client
  });

  test("takes a client back whose last attempt gets connected, though dead, while it asks for its session", async () => {
    const [a, b] = await recovering();
    const link = await Proxy.open(b.port);
    closers.push(() => link.close());
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1);
    const { onMessage } = a.adapter;
    const asked = Promise.withResolvers<void>();
    const isConnected = Promise.withResolvers<void>();
    let questions = 0;
    a.adapter.onMessage = (message, origin) => {
      const answer = () => onMessage.call(a.adapter, message, origin);
      if (message.type !== "find") return answer();
      if (++questions === 1) return void asked.promise.then(answer);
      asked.resolve();
      void isConnected.promise.then(answer);
    };
    b.io.once("connection", () => {
      link.silence();
      isConnected.resolve();
    });
    const dead = new Guest(link);
    const { _pid, _lastOffset } = guest.client as unknown as Record<string, unknown>;
    Object.assign(dead.client, { _pid, _lastOffset });
    await eventually(() => expect(questions).toBe(1));
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("gives what was not read on one server on the next, though the session was handed over twice meanwhile", async () => {
    const [a, b, c] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    for (const n of [1, 2]) a.io.to("red").emit("n", n);
    const offset = Reflect.get(guest.client, "_lastOffset");
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1, 2]));
    await guest.leave();
    await noticed(b);
    Object.assign(guest.client, { _lastOffset: offset }); // as if these had not arrived
    guest.heard.length = 0;
    b.io.to("red").emit("n", 3);
    await b.io.close();
    const sizeOn = ({ adapter }: typeof a) => adapter["recovery"]?.sessions.size;
    const [holder, other] = sizeOn(a) === 1 ? [a, c] : [c, a];
    expect(sizeOn(holder)).toBe(1);
    other.io.to("red").emit("n", 4);
    await eventually(() => expect(other.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    await holder.io.close();
    expect(await guest.back(other)).toBe(true);
    other.io.to("red").emit("n", 5);
    await eventually(() => expect(guest.numbers).toContain(5));
    expect(guest.numbers).toEqual([1, 2, 3, 4, 5]);
  });

  /**
   * A client of the first server comes back to the second one, whose queue goes just then. The session has come over when this
   * resolves, and what the third server sends again waits until it is allowed.
   */
  async function onItsWay() {
    const link = await Proxy.open(broker.port);
    const allowed = Promise.withResolvers<void>();
    const late: Pass = ({ content, again, send, confirm }) => {
      if (!again && !content.includes('"begin"')) return send();
      queueMicrotask(confirm);
      void allowed.promise.then(send);
    };
    const server = { connectionStateRecovery: {} };
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b, c] = await Promise.all([
      start({}, server),
      start({ amqpConnection: far, requestsTimeout: 500 }, server),
      start({ amqpConnection: tampered(late) }, server),
    ]);
    closers.push(async () => {
      await b.adapter.close();
      link.close();
      errorsOf(b);
    });
    await acquainted([a, b, c]);
    const [guest, ann] = await Promise.all([Guest.at(a, ["red"]), join(a, ["red"])]);
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    const { onMessage } = a.adapter;
    a.adapter.onMessage = (message, origin) => {
      if (message.type !== "claim") return onMessage.call(a.adapter, message, origin);
      link.cut("consuming");
      void eventually(() => expect(b.adapter.stats.connected).toBe(false)).then(async () => {
        c.io.to("red").emit("n", 1);
        await received(ann.client, "n");
        onMessage.call(a.adapter, message, origin);
        link.heal();
      });
    };
    const back = guest.back(b);
    await eventually(() => expect(b.adapter.stats).toMatchObject({ connected: true, reconnects: { consuming: 1 } }));
    await Promise.race([back, Bun.sleep(700)]); // longer than its requestsTimeout
    return { b, c, guest, back, allow: allowed.resolve };
  }

  test("gives once what a third server sends again while the session is on its way", async () => {
    const { c, guest, back, allow } = await onItsWay();
    allow();
    expect(await back).toBe(true);
    c.io.to("red").emit("n", 2);
    await eventually(() => expect(guest.numbers).toContain(2));
    expect(guest.numbers).toEqual([1, 2]);
  });

  test("waits no longer for what a third server sends again when its own server closes", async () => {
    const { b, guest } = await onItsWay();
    const isMoving = () => b.adapter["recovery"]?.sessions.isMoving(String(Reflect.get(guest.client, "_pid")));
    expect(isMoving()).toBe(true);
    await b.adapter.close();
    await eventually(() => expect(isMoving()).toBe(false));
  });

  test("takes a client back ten times in a row, at once, though it hears nothing between", async () => {
    const nodes = await recovering();
    const guest = await Guest.at(nodes[0], ["red"]);
    const { id } = guest.client;
    for (let i = 1; i <= 10; i++) {
      await guest.leave();
      expect([i, await guest.back(nodes[i % 3] ?? nodes[0])]).toEqual([i, true]);
    }
    nodes[2].io.to("red").emit("n", 1);
    await eventually(() => expect(guest.numbers).toEqual([1]));
    expect(guest.client.id).toBe(id);
  });

  test("gives packets again that were lost with several connections in a row", async () => {
    const nodes = await recovering();
    const [a, b, c] = nodes;
    const guest = await Guest.at(a, ["red"]);
    const ticket = ticketOf(guest);
    await guest.leave();
    await noticed(a);
    c.io.to("red").emit("n", 1);
    await eventually(() => expect(c.adapter.stats.unconfirmed).toBe(0));
    // Comes back to each server, and is lost again before it has read a word.
    for (const node of [b, a, c, b]) {
      const id = await present(node, ticket);
      expect(id).toBeString();
      for (const socket of node.io.of("/").sockets.values()) socket.conn.close();
      await noticed(node);
      node.io.to("red").emit("n", 2);
      await eventually(() => expect(node.adapter.stats.unconfirmed).toBe(0));
    }
    expect(await guest.back(a)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1, 2, 2, 2, 2]));
  });

  test("keeps a quiet client's session for longer than its log reaches, if it has missed nothing", async () => {
    const nodes = await recovering({ recoveryBytes: 20_000 });
    const [a, b] = nodes;
    const others = await Guest.at(a, ["blue"]);
    const guest = await Guest.at(a, ["red"]);
    const chatter = async () => {
      for (let n = 0; n < 200; n++) a.io.to("blue").emit("n", n, "x".repeat(100));
      await eventually(() => expect(others.numbers.at(-1)).toBe(199));
      others.heard.length = 0;
    };
    await chatter();
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    await chatter();
    expect(await guest.back(a)).toBe(true);
    await chatter();
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    await chatter();
    expect(await guest.back(b)).toBe(true);
    a.io.to("red").emit("n", 1);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test.each([0, 1])(
    "begins a session anew rather than lose packets that its log has let go (server %d)",
    async (to) => {
      const nodes = await recovering({ recoveryBytes: 20_000 });
      const [a] = nodes;
      const guest = await Guest.at(a, ["red"]);
      await guest.leave();
      await noticed(a);
      for (let n = 0; n < 200; n++) a.io.to("red").emit("n", n, "x".repeat(100));
      expect(await guest.back(nodes[to] ?? a)).toBe(false);
    },
  );

  test("gives many clients what they have missed, though a copy for each would not go into its log", async () => {
    const [a, b, c] = await recovering({ recoveryBytes: 20_000 });
    const guests = await Promise.all(Array.from({ length: 20 }, () => Guest.at(a, ["red"])));
    await Promise.all(guests.map((guest) => guest.leave()));
    await noticed(a);
    for (let n = 0; n < 40; n++) b.io.to("red").emit("n", n, "x".repeat(100));
    await eventually(() => expect(b.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    await a.io.close(); // hands the sessions over
    for (const { io } of [b, c]) io.to("red").emit("n", 40);
    for (const guest of guests) {
      expect(await guest.back(b)).toBe(true);
      await eventually(() => expect(guest.numbers).toEqual([...Array(40).keys(), 40, 40]));
    }
    const [first] = guests;
    await first?.leave();
    await eventually(() => expect(b.io.of("/").sockets.size).toBe(19));
    b.io.to("red").emit("n", 41);
    expect(await first?.back(c)).toBe(true);
    await eventually(() => expect(first?.numbers.at(-1)).toBe(41));
  });

  test("claims a session once the namespace is bound, though its client is in no room", async () => {
    const [a, b] = await Promise.all([
      start({}, { connectionStateRecovery: {} }),
      start({ amqpConnection: bindingLate("/doc-1") }, { connectionStateRecovery: {} }),
    ]);
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    const guest = await Guest.at(a, [], "/doc-1");
    await guest.leave();
    const docs = adapterOf(a.io, "/doc-1");
    await eventually(() => expect(docs.sids.size).toBe(0));
    const { onMessage } = docs;
    docs.onMessage = (message, origin) => {
      onMessage.call(docs, message, origin);
      if (message.type === "claim") a.io.of("/doc-1").emit("n", 1);
    };
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("gives what a sender emitted that closed meanwhile once", async () => {
    const binding = Promise.withResolvers<void>();
    const [a, b] = await Promise.all([
      start({}, { connectionStateRecovery: {} }),
      start({ amqpConnection: bindingLate("/#blue", binding.resolve) }, { connectionStateRecovery: {} }),
    ]);
    await acquainted([a, b]);
    await Guest.at(b, ["red"]);
    await settled();
    const guest = await Guest.at(a, ["red", "blue"]);
    await guest.leave();
    await noticed(a);
    const emitter = createEmitter({ amqpConnection, prefix });
    await emitter.ready;
    const back = guest.back(b);
    await binding.promise; // the session is claimed when blue is bound
    emitter.to("red").emit("n", 1);
    await emitter.close();
    expect(await back).toBe(true);
    b.io.to("red").emit("n", 2);
    await eventually(() => expect(guest.numbers.at(-1)).toBe(2));
    expect(guest.numbers).toEqual([1, 2]);
  });

  test("keeps a namespace open until the last session has gone, with its client or without", async () => {
    const server = { connectionStateRecovery: { maxDisconnectionDuration: 1_000 }, cleanupEmptyChildNamespaces: true };
    const [a, b] = await Promise.all([start({}, server), start({}, server)]);
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    const isOpen = ({ io }: Host) => io._nsps.has("/doc-1");
    const guest = await Guest.at(a, ["red"], "/doc-1");
    const lose = async (node: Host) => {
      await guest.leave();
      await eventually(() => expect(node.io.of("/doc-1").sockets.size).toBe(0));
      expect(isOpen(node)).toBe(true);
      node.io.of("/doc-1").to("red").emit("n", 1);
    };
    await lose(a);
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
    await eventually(() => expect(isOpen(a)).toBe(false));
    await lose(b);
    await eventually(() => expect(isOpen(b)).toBe(false), 4_000);
  });

  test("for any time is the same on another server", async () => {
    const server = { connectionStateRecovery: { maxDisconnectionDuration: Infinity } };
    const [a, b] = await cluster({}, server);
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1);
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("keeps a namespace open while a client waits for its session, though another one goes", async () => {
    const server = { connectionStateRecovery: {}, cleanupEmptyChildNamespaces: true };
    const link = await Proxy.open(broker.port);
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const [a, b] = await Promise.all([start({}, server), start({ amqpConnection: far }, server)]);
    closers.push(async () => {
      await b.io.close();
      link.close();
    });
    await acquainted([a, b]);
    for (const { io } of [a, b]) io.of(/^\/doc-/);
    await join(a, [], "/doc-1");
    const guest = await Guest.at(a, ["red"], "/doc-1");
    const other = await join(b, [], "/doc-1");
    await guest.leave();
    await eventually(() => expect(a.io.of("/doc-1").sockets.size).toBe(1));
    link.latency = 50;
    const back = guest.back(b);
    await eventually(() => expect(adapterOf(b.io, "/doc-1")["recovery"]?.keepsOpen).toBe(true));
    other.client.disconnect();
    expect(await back).toBe(true);
    link.latency = 0;
  });

  test("opens no namespace while the server closes", async () => {
    const link = await Proxy.open(broker.port);
    const far = () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`);
    const server = { connectionStateRecovery: {} };
    const [a, b] = await Promise.all([start({ amqpConnection: far }, server), start({}, server)]);
    await acquainted([a, b]);
    a.io.of(/^\/doc-/);
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    link.latency = 50;
    const closed = a.adapter.close(); // hands the session over
    await join(a, [], "/doc-9");
    await closed;
    link.latency = 0;
    await eventually(async () => expect(await queues()).toHaveLength(1));
    expect(await guest.back(b)).toBe(true);
    link.close();
  });

  test("does not give a client what a room heard before it joined", async () => {
    const [a, b] = await recovering();
    await Guest.at(a, ["blue"]);
    const guest = await Guest.at(a, ["red"]);
    a.io.to("blue").emit("n", 1);
    await guest.on(a).join("blue");
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    a.io.to("blue").emit("n", 2);
    expect(await guest.back(b)).toBe(true);
    a.io.to("blue").emit("n", 3);
    await eventually(() => expect(guest.numbers).toEqual([2, 3]));
  });

  test.each([
    ["skips middlewares", {}, false],
    ["runs middlewares if that is wanted, and keeps what comes meanwhile", { skipMiddlewares: false }, true],
  ])("%s", async (_, connectionStateRecovery, runs) => {
    const nodes = await recovering({}, { connectionStateRecovery });
    const [a, b, c] = nodes;
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    let ran = 0;
    b.io.use((_, next) => {
      ran++;
      c.io.to("red").emit("n", 1);
      b.io.to("red").emit("n", 2);
      setTimeout(next, 100);
    });
    expect(await guest.back(b)).toBe(true);
    expect(ran).toBe(Number(runs));
    if (runs) await eventually(() => expect(guest.numbers.toSorted()).toEqual([1, 2]));
  });

  test("keeps the session of a client that a middleware refuses, or that is gone before it is connected", async () => {
    const [a, b, c] = await recovering({}, { connectionStateRecovery: { skipMiddlewares: false } });
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    b.io.use((_, next) => next(new Error("no")));
    const refused = received(guest.client, "connect_error");
    Object.assign(guest.client.io, { uri: `http://127.0.0.1:${b.port}` });
    guest.client.connect();
    await refused;
    guest.client.io.engine.close();
    c.io.to("red").emit("n", 1);
    expect(await guest.back(c)).toBe(true);
    await eventually(() => expect(guest.numbers).toEqual([1]));
  });

  test("gives a session to one of two that ask at once, and to none that comes later", async () => {
    const [a, b, c] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    const { id = "" } = guest.client;
    const ticket = ticketOf(guest);
    await guest.leave();
    await noticed(a);
    const ids = await Promise.all([present(b, ticket), present(c, ticket), present(a, ticket)]);
    expect(ids.filter((given) => given === id)).toHaveLength(1);
    await Bun.sleep(200);
    for (const node of [a, b, c]) expect(await present(node, ticket)).not.toBe(id);
  });

  test.each<[string, (ticket: Ticket) => Partial<Ticket>]>([
    ["an unknown id", ({ offset }) => ({ pid: "A".repeat(20), offset })],
    ["no offset", ({ pid }) => ({ pid })],
    ["another offset", ({ pid }) => ({ pid, offset: "foo" })],
    ["an offset of no server", ({ pid, offset }) => ({ pid, offset: offset.replace(/^.{8}/, "ABCDEFGH") })],
    ["an offset that was never given", ({ pid, offset }) => ({ pid, offset: `${offset}9` })],
    ["an offset that is no number", ({ pid, offset }) => ({ pid, offset: `${offset.slice(0, 9)}1e3` })],
    ["an offset from before it came", ({ pid, offset }) => ({ pid, offset: `${offset.slice(0, 9)}0` })],
  ])("begins anew for a client that presents %s", async (_, forge) => {
    const [a, b] = await recovering();
    const other = await Guest.at(a, ["red"]);
    const guest = await Guest.at(a, ["red"]);
    const ticket = ticketOf(guest);
    await guest.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    a.io.to("red").emit("n", 1);
    for (const node of [a, b]) {
      const id = await present(node, forge(ticket));
      expect([id === guest.client.id, node.io.of("/").sockets.get(id ?? "")?.recovered]).toEqual([false, false]);
    }
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect([guest.numbers, other.numbers]).toEqual([[1], [1]]));
  });

  test("lets sessions and the bindings of their rooms go when their time is over", async () => {
    const [a, b] = await recovering({}, { connectionStateRecovery: { maxDisconnectionDuration: 300 } });
    const bound = async () => (await bindings()).filter(({ key }) => key === "/#red").length;
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    expect(await bound()).toBe(1);
    await eventually(async () => expect(await bound()).toBe(0), 3_000);
    expect(await guest.back(b)).toBe(false);
  });

  test("keeps no session longer than it should, though nothing has looked", async () => {
    const [a] = await recovering({}, { connectionStateRecovery: { maxDisconnectionDuration: 100 } });
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await Bun.sleep(150);
    expect(await guest.back(a)).toBe(false);
  });

  test("begins anew, and says why, where a client's data cannot be sent to the server that it comes back to", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    guest.on(a).data = { n: 1n };
    await guest.leave();
    await noticed(a);
    expect(await guest.back(b)).toBe(false);
    expect(errorsOf(a)).toEqual([
      expect.stringContaining("cannot be sent to another server: its client begins anew there"),
    ]);
  });

  const large = '"'.repeat(8_000); // as JSON in JSON it takes four bytes each

  test("begins anew at once where what a client missed is too large to be handed over", async () => {
    const [a, b] = await recovering({ maxPayload: 20_000 });
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", large);
    b.io.to("red").emit("n", 2);
    await eventually(() => expect(b.adapter.stats.unconfirmed).toBe(0));
    expect(await guest.back(b)).toBe(false);
  });

  test("hands over the sessions of all others when somebody has missed what is too large for that", async () => {
    const server = { connectionStateRecovery: {} };
    const [a, b] = await Promise.all([start({ maxPayload: 20_000 }, server), start({ maxPayload: 20_000 }, server)]);
    await acquainted([a, b]);
    const [ann, bob] = [await Guest.at(a, ["red"]), await Guest.at(a, ["blue"])];
    a.io.to("red").emit("n", large);
    a.io.to("blue").emit("n", 1);
    await eventually(() => expect(ann.heard).toHaveLength(1));
    await Promise.all([ann.leave(), bob.leave()]);
    await noticed(a);
    a.io.to("red").emit("n", large);
    a.io.to("blue").emit("n", 2);
    await a.io.close();
    expect([await ann.back(b), await bob.back(b)]).toEqual([false, true]);
    await eventually(() => expect(bob.numbers).toEqual([1, 2]));
  });

  test("begins anew rather than go without a part of what was handed over", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    for (const n of [1, 2]) a.io.to("red").emit("n", n);
    const { onMessage } = b.adapter;
    b.adapter.onMessage = (message, origin) => {
      if (message.type === "items" && message.items.length > 2) message.items.splice(1, 1);
      onMessage.call(b.adapter, message, origin);
    };
    expect(await guest.back(b)).toBe(false);
  });

  test("asks nobody for what no server has given", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    const asked = spyOn(b.adapter, "onMessage");
    const { pid, offset } = ticketOf(guest);
    await present(a, { pid: pid + "x".repeat(1_000), offset });
    await present(a, { pid, offset: `${offset}${"0".repeat(1_000)}` });
    expect(asked.mock.calls.filter(([{ type }]) => type === "find")).toEqual([]);
  });

  /** The session of a lost client of a server that has closed: who has it, and who has not. */
  async function handedOver() {
    const [a, b, c] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    await a.io.close();
    const has = ({ adapter }: typeof a) => adapter["recovery"]?.sessions.size === 1;
    const [holder, other] = has(b) ? [b, c] : [c, b];
    const d = await start({ requestsTimeout: 2_000 }, { connectionStateRecovery: {} });
    await acquainted([holder, other, d]);
    return { guest, holder, other, d, has };
  }

  test("takes a session over from the server that was faster in taking it over", async () => {
    const { guest, holder, other, d, has } = await handedOver();
    const { onMessage } = holder.adapter;
    holder.adapter.onMessage = (message, origin) => {
      const answer = () => onMessage.call(holder.adapter, message, origin);
      if (message.type !== "claim" || origin.sender !== d.adapter.uid) return answer();
      holder.adapter.onMessage = onMessage;
      const toOther = holder.adapter["routes"].direct(other.adapter.uid);
      holder.adapter["node"].sender.add(toOther, [JSON.stringify({ type: "offer", id: "1" })]);
      void eventually(() => expect([has(holder), has(other)]).toEqual([false, true])).then(answer);
    };
    expect(await guest.back(d)).toBe(true);
  });

  test("waits for no server that hangs where another one has the session", async () => {
    const { guest, other, d } = await handedOver();
    other.adapter.onMessage = () => {};
    let recovered = false;
    expect(await milliseconds(async () => (recovered = await guest.back(d)))).toBeLessThan(1_000);
    expect(recovered).toBe(true);
  });

  test("hands sessions over though the server that is asked first hangs", async () => {
    const [a, b, c] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    const [first] = a.adapter["node"].membership.serversOf("/");
    const [hangs, other] = first === b.adapter.uid ? [b, c] : [c, b];
    hangs.adapter.onMessage = () => {};
    await a.io.close();
    expect(await guest.back(other)).toBe(true);
  });

  test("lets a session go when its time is over though a middleware never ends", async () => {
    const connectionStateRecovery = { skipMiddlewares: false, maxDisconnectionDuration: 500 };
    const [a, b] = await recovering({}, { connectionStateRecovery });
    const guest = await Guest.at(a, ["red"]);
    await guest.leave();
    await noticed(a);
    const asked = Promise.withResolvers<void>();
    b.io.use(() => asked.resolve());
    void guest.back(b);
    await asked.promise;
    const count = () => b.adapter["recovery"]?.sessions.size;
    expect(count()).toBe(1);
    await eventually(() => expect(count()).toBe(0), 3_000);
  });

  test("closes the old connection of a client though a listener for that throws, and says so", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a, ["red"]);
    const socket = guest.on(a);
    socket.on("disconnecting", () => {
      throw new Error("a listener's");
    });
    const lost = received(guest.client, "disconnect");
    await present(b, ticketOf(guest));
    await lost;
    socket.removeAllListeners(); // or io.close() fails
    expect(errorsOf(a)).toEqual([expect.stringContaining("a listener's")]);
  });

  test("keeps data that is undefined", async () => {
    const [a, b] = await recovering();
    const guest = await Guest.at(a);
    guest.on(a).data = undefined;
    await guest.leave();
    await noticed(a);
    expect(await guest.back(b)).toBe(true);
    expect(guest.on(b).data).toBeUndefined();
  });

  test("bears rooms that are neither strings nor numbers, also once its log is full", async () => {
    const [a, b] = await recovering({ recoveryBytes: 20_000 });
    const guest = await Guest.at(b, ["red"]);
    for (let n = 0; n < 300; n++) a.io.to(["red", false as unknown as string]).emit("n", n, "x".repeat(100));
    await eventually(() => expect(guest.numbers.at(-1)).toBe(299));
    expect(guest.numbers).toHaveLength(300);
    await guest.leave();
    await noticed(b);
    a.io.to(["red", 42n as unknown as string]).emit("n", 300);
    expect(await guest.back(a)).toBe(true);
    await eventually(() => expect(guest.numbers.at(-1)).toBe(300));
  });

  test("works with another parser", async () => {
    const [a, b] = await recovering({}, { parser: msgpack });
    const guest = await Guest.at(a, ["red"], "/", { parser: msgpack });
    await guest.leave();
    await noticed(a);
    a.io.to("red").emit("n", 1, Buffer.from("x"));
    b.io.to("red").emit("n", 2);
    await eventually(() => expect(b.adapter.stats.unconfirmed).toBe(0));
    expect(await guest.back(b)).toBe(true);
    await eventually(() => expect(guest.numbers.toSorted()).toEqual([1, 2]));
  });

  test("hands the sessions of a server that closes to another one, one server after the other", async () => {
    const [a, b, c] = await recovering();
    const [gone, there] = [await Guest.at(a, ["red"]), await Guest.at(a, ["red"])];
    const guests = [gone, there, await Guest.at(b, ["red"])]; // b will hand over what it was handed, and its own
    await gone.leave();
    await eventually(() => expect(a.io.of("/").sockets.size).toBe(1));
    a.io.to("red").emit("n", 1);
    await eventually(() => expect(there.numbers).toEqual([1]));
    await a.io.close();
    c.io.to("red").emit("n", 2);
    await eventually(() => expect(c.adapter.stats.unconfirmed).toBe(0));
    await acquainted([b, c]);
    await b.io.close();
    c.io.to("red").emit("n", 3);
    const d = await start({ requestsTimeout: 2_000 }, { connectionStateRecovery: {} });
    await acquainted([c, d]);
    for (const guest of guests) {
      expect(await guest.back(d)).toBe(true);
      c.io.to("red").emit("n", 4);
    }
    for (const guest of guests) await eventually(() => expect(guest.numbers).toEqual([1, 2, 3, 4, 4, 4]));
  });

  test("hands over what it can, though the data of one client cannot be sent", async () => {
    const settings = [{ requestsTimeout: 2_000 }, { connectionStateRecovery: {} }] as const;
    const [a, b] = [await start(...settings), await start(...settings)];
    await acquainted([a, b]);
    const [odd, own, inherited] = [await Guest.at(b), await Guest.at(b), await Guest.at(a)];
    odd.on(b).data = { n: 1n };
    for (const guest of [odd, own]) await guest.leave();
    await noticed(b);
    await a.io.close(); // what b inherits is handed over apart from its own sessions
    const c = await start(...settings);
    await acquainted([b, c]);
    await b.io.close();
    expect(errorsOf(b)).toEqual([expect.stringContaining("cannot be sent to another server")]);
    expect([await odd.back(c), await own.back(c), await inherited.back(c)]).toEqual([false, true, true]);
  });

  test("begins anew soon after the server that knew the client was killed", async () => {
    const b = await start({}, { connectionStateRecovery: {} });
    const victim = child(`
      const io = new Server(0, { serveClient: false, connectionStateRecovery: {}, adapter: createAdapter({ amqpConnection, prefix }) });
      io.on("connection", (socket) => socket.emit("welcome"));
      await io.of("/").adapter.ready;
      console.log(io.httpServer.address().port);`);
    const { value } = await victim.stdout.getReader().read();
    const port = Number(new TextDecoder().decode(value));
    await acquainted([b], 2);
    const guest = new Guest({ port });
    await received(guest.client, "welcome");
    const lost = received(guest.client, "disconnect");
    victim.kill("SIGKILL");
    await lost;
    let recovered = true;
    expect(await milliseconds(async () => (recovered = await guest.back(b)))).toBeLessThan(1_500);
    expect(recovered).toBe(false);
  });

  test("takes a client back to its own server while the broker is away, and to another one as a new one, at once", async () => {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port)]);
    const nodes = await Promise.all(
      links.map(({ port }) =>
        start(
          { amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${port}?heartbeat=2`), requestsTimeout: 1_000 },
          { connectionStateRecovery: {} },
        ),
      ),
    );
    const [a, b] = nodes;
    if (!a || !b) throw new Error("two links are two servers");
    closers.push(async () => {
      await Promise.all(nodes.map(({ adapter }) => adapter.close()));
      for (const link of links) link.close();
      nodes.forEach(errorsOf);
    });
    await acquainted(nodes);
    const [own, away] = await Promise.all([Guest.at(a, ["red"]), Guest.at(a, ["red"])]);
    for (const link of links) link.cut();
    await eventually(() => expect(nodes.map(({ adapter }) => adapter.stats.connected)).toEqual([false, false]));
    await Promise.all([own.leave(), away.leave()]);
    await noticed(a);
    a.io.to("red").emit("n", 1);
    expect(await own.back(a)).toBe(true);
    await eventually(() => expect(own.numbers).toEqual([1]));
    let recovered = true;
    expect(await milliseconds(async () => (recovered = await away.back(b)))).toBeLessThan(500);
    expect(recovered).toBe(false);
  });

  test("stores and stamps nothing where it is off", async () => {
    const [a, b] = await cluster();
    const ann = await join(a, ["red"]);
    b.io.to("red").emit("n", 1);
    await eventually(() => expect(ann.heard).toEqual([["n", 1]]));
    expect((ann.client as unknown as { _pid?: string })._pid).toBeUndefined();
    a.adapter.persistSession({ sid: "x", pid: "y", rooms: ["red"], data: {} });
    expect(a.adapter.restoreSession("y", "z")).rejects.toThrow("off");
  });
});

test("nothing of all this is left on the broker", nothingIsLeft);
