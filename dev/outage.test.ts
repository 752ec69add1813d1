/** Connections that fail, and outages. How tests are made: see fixture.ts. */
import { connect, type Channel, type ChannelModel, type RecoveringChannelModel } from "amqplib";
import { describe, expect, spyOn, test } from "bun:test";
import { once } from "node:events";
import { setInterval } from "node:timers/promises";
import { Server } from "socket.io";
import {
  acquainted,
  bindings,
  broker,
  closeConnections,
  closers,
  cluster,
  control,
  crew,
  errors,
  errorsOf,
  eventually,
  heardFrom,
  introduce,
  join,
  milliseconds,
  nothingIsLeft,
  only,
  prefix,
  publish,
  queues,
  received,
  reunited,
  RUN,
  settled,
  shared,
  start,
  tampered,
  unchanged,
  urlWith,
  useBroker,
  type Member,
  type Node,
  type Pass,
  type Passing,
} from "./fixture";
import { Proxy } from "./proxy";
import { createEmitter, readFrame, type AdapterOptions } from "../index";

useBroker();

describe("a connection", () => {
  const opened: Record<string, () => Promise<AdapterOptions["amqpConnection"]>> = {
    "that is a promise": async () => () => connect(broker.url),
    "that is an object, one for each call": async () => {
      const connections = [await connect(broker.url), await connect(broker.url)];
      return () => connections.shift() ?? connect(broker.url);
    },
  };
  test.each(Object.entries(opened))("%s serves a server", async (_, opened) => {
    const [a, b, c] = await Promise.all([start(), start(), start({ amqpConnection: await opened() })]);
    await acquainted([a, b, c]);
    const [ann, cat] = await Promise.all([join(a, ["red"]), join(c, ["red"])]);
    const all = [ann, cat].flatMap(({ client }) => [received(client, "from b"), received(client, "from c")]);
    b.io.to("red").emit("from b");
    c.io.to("red").emit("from c");
    await Promise.all(all);
  });

  test("that fails is tried again, and said so", async () => {
    let calls = 0;
    const node = await start({
      amqpConnection: () => {
        if (++calls === 1) throw new Error("thrown");
        if (calls === 2) return Promise.reject(new Error("rejected"));
        if (calls === 3) return {} as ChannelModel;
        return calls < 6 ? connect("amqp://127.0.0.1:1") : connect(broker.url);
      },
    });
    await node.adapter.ready;
    const said = errorsOf(node).join();
    expect(said).toContain("The consuming connection could not be opened: thrown");
    expect(said).toContain("rejected");
    expect(said).toContain("amqpConnection returned {}");
    expect(said).toContain("ECONNREFUSED");
    expect(node.adapter.stats.connected).toBe(true);
  });

  test("with a small frame_max carries an emit to a thousand rooms, and stays", async () => {
    const { a, bob, people } = await crew({ amqpConnection: () => connect(urlWith({ search: "frameMax=8192" })) });
    const rooms = Array.from({ length: 1_000 }, (_, i) => `room-${i}`);
    const hello = received(bob.client, "hello");
    a.io.to([...rooms, "blue"]).emit("hello");
    await hello; // what follows would share the message, and its keys
    expect(await heardFrom(a.io, people)).toEqual(only("bob cat", people, ["hello"]));
    expect(a.adapter.stats.reconnects).toEqual({ consuming: 0, publishing: 0 });
  });

  test("stays when an emit names more rooms than amqplib has room for in a header", async () => {
    const { a, people } = await crew();
    a.io.to([...Array.from({ length: 2_000 }, (_, i) => `${"房".repeat(10)}${i}`), "blue"]).emit("hello");
    await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0));
    expect(await heardFrom(a.io, people)).toEqual(only("bob cat", people, ["hello"]));
    expect(a.adapter.stats.reconnects).toEqual({ consuming: 0, publishing: 0 });
  });

  test.each([
    [
      "with too few channels",
      { search: "channelMax=2" },
      /No channels left.*; allow at least \d+ channels: channelMax/,
    ],
    [
      "to a virtual host that is missing",
      { pathname: "/no-such-host" },
      /; create the virtual host that the URL names/,
    ],
  ])("%s says what to do", async (_, part, advice) => {
    const node = await start({ amqpConnection: () => connect(urlWith(part)) });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toMatch(advice);
    await node.io.close();
    errorsOf(node);
  });

  test("that never comes costs local sockets nothing", async () => {
    const node = await start({ amqpConnection: () => connect("amqp://127.0.0.1:1"), requestsTimeout: 200 });
    const ann = await join(node);
    expect(await milliseconds(async () => ann.socket.join("red"))).toBeLessThan(200);
    node.io.to("red").emit("hello");
    expect(await heardFrom(node.io, { ann })).toEqual({ ann: [["hello"]] });
    expect(await milliseconds(() => node.io.fetchSockets())).toBeLessThan(200);
    expect(node.adapter.stats).toMatchObject({ connected: false, reconnects: { consuming: 0, publishing: 0 } });
    expect(await milliseconds(() => node.io.close())).toBeLessThan(700); // its two packets wait for requestsTimeout
    await expect(node.adapter.ready).rejects.toThrow("closed");
    expect(errorsOf(node).at(-1)).toContain("had confirmed 2 packets");
  });

  test.each<[when: string, recovery: true | { waitForConnect: false }]>([
    ["at once", true],
    ["later", { waitForConnect: false }],
  ])("that amqplib itself would open again, %s, is refused and closed", async (_, recovery) => {
    const opened: RecoveringChannelModel[] = [];
    const recovering = async () => {
      const model = await connect(broker.url, { recovery });
      opened.push(model);
      return model as unknown as ChannelModel;
    };
    const node = await start({ amqpConnection: recovering });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toContain("leave it out");
    const ann = await join(node);
    expect(await milliseconds(async () => ann.socket.join("red"))).toBeLessThan(500);
    await node.io.close();
    for (const model of opened) await expect((async () => model.createChannel())()).rejects.toThrow();
    for (const error of errorsOf(node)) expect(error).toContain("amqplib's recovery");
  });

  test("that is closed without a promise is closed all the same", async () => {
    const odd = async () => {
      const model = await connect(broker.url);
      const close = model.close.bind(model);
      model.close = (() => void close().catch(() => {})) as unknown as typeof close;
      return model;
    };
    const node = await start({ amqpConnection: odd });
    await node.adapter.ready;
    await closeConnections();
    await eventually(() => expect(node.adapter.stats.reconnects).toEqual({ consuming: 1, publishing: 1 }));
    errorsOf(node);
  });

  test("that the broker blocks for longer than heartbeatTimeout stays, and a server that starts then is ready soon after", async () => {
    const heartbeats = { heartbeatInterval: 100, heartbeatTimeout: 500 };
    const { nodes, a, people } = await crew(heartbeats);
    const blocked = once(a.adapter, "error");
    await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)");
    try {
      a.io.emit("blocked");
      await blocked;
      nodes.push(await start(heartbeats));
      await Bun.sleep(1_500); // three times heartbeatTimeout
    } finally {
      await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)");
    }
    expect(await milliseconds(() => acquainted(nodes))).toBeLessThan(1_500);
    await heardFrom(a.io, people);
    for (const node of nodes) {
      expect(node.adapter.stats.reconnects).toEqual({ consuming: 0, publishing: 0 });
      for (const error of errorsOf(node)) expect(error).toContain("blocks publishing");
    }
  }, 15_000);

  test("that brings what came while the process was held up takes nobody for silent", async () => {
    const [a, b] = await cluster();
    const { receiver, sender, membership } = a.adapter["node"];
    // Twice heartbeatTimeout.
    for (const { connection } of [receiver, sender]) connection.upSince = Number(connection.upSince) - 20_000;
    for (const heard of [receiver, ...membership.peers.values()]) heard.heardAt -= 20_000;
    b.io.serverSideEmit("first");
    await once(a.io, "first");
    membership.watch();
    expect(await a.adapter.serverCount()).toBe(3);
  });

  test("whose queue has lost its bindings is opened again, and nothing is lost", async () => {
    const heartbeats = { heartbeatInterval: 100, heartbeatTimeout: 400 };
    const [a, b] = await Promise.all([start(heartbeats), start(heartbeats)]);
    await acquainted([a, b]);
    const bob = await join(b, ["red"]);
    await settled();
    const admin = await connect(broker.url);
    const channel = await admin.createChannel();
    await channel.deleteExchange(`${prefix}#keys`);
    await admin.close();
    await eventually(() => expect(a.adapter.stats.reconnects.publishing).toBe(1));
    for (let n = 0; n < 5; n++) a.io.to("red").emit("n", n);
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1, 2, 3, 4]), 4_000);
    for (const node of [a, b])
      for (const error of errorsOf(node)) expect(error).toMatch(/no exchange|The queue gets nothing any more/);
    expect(b.adapter.stats.reconnects.consuming).toBe(1);
  });

  test("that is returned a second time is refused, and said what to do", async () => {
    const one = await connect(broker.url);
    const node = await start({ amqpConnection: () => one });
    const [error] = await once(node.adapter, "error");
    expect(String(error)).toContain("return a new connection from each call");
    errorsOf(node);
  });

  test("is ready though somebody's queue is full and refuses what the server says", async () => {
    const other = await connect(broker.url);
    closers.push(() => other.close());
    const channel = await other.createChannel();
    const full = { "x-max-length": 1, "x-overflow": "reject-publish" };
    const { queue } = await channel.assertQueue("", { exclusive: true, arguments: full });
    channel.sendToQueue(queue, Buffer.from("hello"));
    await channel.assertExchange(`${prefix}#keys`, "direct");
    await channel.bindQueue(queue, `${prefix}#keys`, "@");
    const { adapter } = await start();
    await adapter.ready;
  });

  const faults: Record<string, (channels: Channel[]) => Promise<unknown>> = {
    "closed by the operator": closeConnections,
    "whose queue the operator deletes": async () => {
      const name = `<<${JSON.stringify((await queues())[0]?.name)}>>`;
      const find = `{ok, Queue} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, ${name}))`;
      await broker.evaluate(`begin ${find}, rabbit_amqqueue:delete(Queue, false, false, <<"operator">>) =/= [] end`);
    },
    "whose channels the broker closes": (channels) =>
      Promise.allSettled(channels.map((channel) => channel.checkExchange("is not there"))),
  };
  test.each(Object.entries(faults))(
    "%s is opened again, and everything bound",
    async (_, fault) => {
      const channels: Channel[] = [];
      const { nodes } = await crew({
        amqpConnection: async () => {
          const connection = await connect(broker.url);
          const { createChannel, createConfirmChannel } = connection;
          connection.createChannel = async (options) => {
            const channel = await createChannel.call(connection, options);
            channels.push(channel);
            return channel;
          };
          connection.createConfirmChannel = async (options) => {
            const channel = await createConfirmChannel.call(connection, options);
            channels.push(channel);
            return channel;
          };
          return connection;
        },
      });
      const reported = Promise.race(nodes.map(({ adapter }) => once(adapter, "error")));
      await fault(channels);
      await reported;
      await reunited(nodes);
      for (const node of nodes) expect(await node.io.fetchSockets()).toHaveLength(3);
      nodes.forEach(errorsOf);
    },
    30_000,
  );

  test("comes back with the broker, which may also be away at the start", async () => {
    const [a, b] = await Promise.all([start(), start()]);
    await acquainted([a, b]);
    const [ann, bob] = await Promise.all([join(a, ["red"]), join(b, ["red", "blue"])]);
    await broker.stop();
    const c = await start();
    const cat = await join(c);
    expect(await milliseconds(async () => cat.socket.join("blue"))).toBeLessThan(200);
    c.io.to("blue").emit("hello");
    expect(await heardFrom(c.io, { cat })).toEqual({ cat: [["hello"]] });
    expect(a.adapter.stats.connected).toBe(false);
    await ann.socket.leave("red");
    await ann.socket.join("green");
    await broker.start();
    introduce({ ann, bob, cat });
    await reunited([a, b, c], ["red", "blue", "green"]);
    expect((await a.io.in("red").fetchSockets()).map(({ id }) => id)).toEqual([bob.socket.id]);
    const rooms = async () => new Set((await bindings()).map(({ key }) => key).filter((key) => key.includes("#")));
    await eventually(async () => expect([...(await rooms())].toSorted()).toEqual(["/#blue", "/#green", "/#red"]));
    for (const node of [a, b, c]) expect(errorsOf(node).length).toBeGreaterThan(0);
  }, 60_000);

  test("without permission is refused, said so, and works as soon as the least permission is given", async () => {
    const user = `${RUN}-user`;
    const users = (change: string, ...values: string[]) => {
      const binaries = [user, ...values, "tests"].map((value) => `<<${JSON.stringify(value)}>>`);
      return broker.evaluate(`rabbit_auth_backend_internal:${change}(${binaries.join()})`);
    };
    await users("add_user", "secret");
    closers.push(() => users("delete_user"));
    await users("set_permissions", "/", "^$", "^$", "^$");
    const [a, b] = await Promise.all([start(), start()]);
    await acquainted([a, b]);
    const url = urlWith({ username: user, password: "secret" });
    const c = await start({ amqpConnection: () => connect(url) });
    const [error] = await once(c.adapter, "error");
    expect(String(error)).toMatch(/403|ACCESS_REFUSED/);
    const ours = `^${prefix}(#|$)`;
    await users("set_permissions", "/", ours, ours, ours);
    await c.adapter.ready;
    await acquainted([a, b, c]);
    const cat = await join(c, ["red"]);
    b.io.to("red").emit("hello");
    expect(await heardFrom(b.io, { cat })).toEqual({ cat: [["hello"]] });
    expect(errorsOf(c).length).toBeLessThan(20); // no hot loop
    await c.adapter.close(); // before its user is deleted
    errorsOf(c);
  }, 60_000);

  test("that the broker blocks holds what is published, and joins go on", async () => {
    const { nodes, a, cat, people } = await crew();
    const hello = received(cat.client, "hello");
    await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.0)");
    try {
      const blocked = once(a.adapter, "error");
      a.io.emit("blocked");
      expect(String(await blocked)).toMatch(/block/i);
      await cat.socket.join("green");
      a.io.to("green").emit("hello");
    } finally {
      await broker.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4)");
    }
    await hello;
    expect(await heardFrom(a.io, people)).toEqual({
      ann: [["blocked"]],
      bob: [["blocked"]],
      cat: [["blocked"], ["hello"]],
    });
    nodes.forEach(errorsOf);
  }, 30_000);
});

describe("an outage", () => {
  /** The crew, each server behind a link of its own, that can be cut. */
  async function linked(options: Partial<AdapterOptions> = {}) {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port), Proxy.open(broker.port)]);
    const [a, b, c] = await Promise.all(
      links.map(({ port }) =>
        start({ ...options, amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${port}?heartbeat=1`) }),
      ),
    );
    if (!a || !b || !c) throw new Error("three links are three servers");
    const nodes = [a, b, c];
    closers.push(async () => {
      await Promise.all(nodes.map(({ adapter }) => adapter.close()));
      for (const link of links) link.close();
    });
    await acquainted(nodes);
    const [bob, cat] = await Promise.all([join(b, ["red"]), join(c, ["red"])]);
    return { links, nodes, a, b, c, bob, cat };
  }

  /** Emits numbers to the room, plain and with binary, until it is told to stop. Returns how many it has emitted. */
  async function count({ io }: Node, sender: string, until: Promise<unknown>): Promise<number> {
    let stopped = false;
    void until.then(() => (stopped = true));
    let number = 0;
    for await (const _ of setInterval(5)) {
      io.to("red").emit("number", sender, number, ...(number % 7 === 0 ? [Buffer.from([number % 256])] : []));
      number++;
      if (stopped) return number;
    }
    return number;
  }

  /** The numbers of one sender that a client has heard. */
  const numbers = ({ heard }: Member, sender: string): unknown[] =>
    heard.filter(([event, from]) => event === "number" && from === sender).map(([, , number]) => number);
  const upTo = (count: number): number[] => Array.from({ length: count }, (_, number) => number);

  /** Two servers, each behind a link of its own. Bob, at the second, has heard number 0. */
  async function pair(passes: { a?: Pass; b?: Pass } = {}, options: Partial<AdapterOptions> = {}) {
    const [linkA, linkB] = [await Proxy.open(broker.port), await Proxy.open(broker.port)];
    const nodes = await Promise.all([
      start({ ...options, amqpConnection: tampered(passes.a ?? unchanged, linkA.port) }),
      start({ ...options, amqpConnection: tampered(passes.b ?? unchanged, linkB.port) }),
    ]);
    const [a, b] = nodes;
    closers.push(async () => {
      await Promise.all([a.adapter.close(), b.adapter.close()]);
      for (const link of [linkA, linkB]) link.close();
      nodes.forEach(errorsOf);
    });
    await acquainted(nodes);
    const bob = await join(b, ["red", "blue"]);
    a.io.to("red").emit("number", "a", 0);
    await received(bob.client, "number");
    /** Each in a frame of its own. */
    const emit = async (from: number, to: number, turn = 20, ...more: unknown[]) => {
      for (let number = from; number <= to; number++) {
        a.io.to(number % 2 ? "blue" : "red").emit("number", "a", number, ...more);
        if (number % turn === 0) await Bun.sleep(0);
      }
      await eventually(() => expect(a.adapter.stats.unconfirmed).toBe(0), 10_000);
    };
    /** What bob has heard, once he has this number. */
    const until = async (number: number) => {
      await eventually(() => expect(numbers(bob, "a")).toContain(number), 20_000);
      return numbers(bob, "a");
    };
    const back = (node: Node) => eventually(() => expect(node.adapter.stats.connected).toBe(true), 10_000);
    return { linkA, linkB, nodes, a, b, bob, emit, until, back };
  }

  /** Two servers, the second behind a link that is cut while the first emits these numbers, each in a frame of its own. */
  async function missed(count: number, pass: Pass) {
    const two = await pair({ a: pass });
    two.linkB.cut();
    await two.emit(1, count - 1);
    two.linkB.heal();
    return two;
  }

  const faults: Record<string, (links: Proxy[], sender: Server) => Promise<unknown>> = {
    "of the receiver": async ([, link], sender) => {
      link?.cut();
      await Bun.sleep(150);
      sender.to("red").emit("large", Buffer.alloc(2 ** 24 - 5_000)); // the default of maxPayload is 2 ** 24
      await Bun.sleep(150);
      link?.heal();
    },
    "of the sender": async ([link]) => (link?.cut(), Bun.sleep(300).then(() => link?.heal())),
    "of everybody": async (links) => {
      for (const link of links) link.cut();
      await Bun.sleep(300);
      for (const link of links) link.heal();
    },
    "of the publishing connections": async (links) => {
      for (const link of links) link.cut("publishing");
      for (const link of links) link.heal();
    },
    "of the consuming connections": async (links) => {
      for (const link of links) link.cut("consuming");
      for (const link of links) link.heal();
    },
    "of the broker": () => broker.stop().then(() => broker.start()),
    "that nobody is told of": async ([, link]) => {
      link?.silence();
      await Bun.sleep(1_000);
    },
  };
  const stricken = shared(linked);
  test.each(Object.entries(faults))(
    "%s loses, doubles and reorders nothing",
    async (_, fault) => {
      const { links, nodes, a, b, bob, cat } = await stricken();
      for (const { heard } of [bob, cat]) heard.length = 0;
      const over = Promise.withResolvers<void>();
      const counted = Promise.all([count(a, "a", over.promise), count(b, "b", over.promise)]);
      await eventually(() => expect(numbers(cat, "a").length).toBeGreaterThan(20));
      await fault(links, a.io);
      await eventually(() => {
        for (const { adapter } of nodes) expect(adapter.stats).toMatchObject({ connected: true, unconfirmed: 0 });
        expect(nodes.some(({ adapter }) => errors.get(adapter)?.length)).toBe(true);
      }, 15_000);
      over.resolve();
      const [ofA, ofB] = await counted;
      await eventually(() => expect(numbers(bob, "a").at(-1)).toBe(ofA - 1), 15_000);
      await eventually(() => expect(numbers(cat, "a").at(-1)).toBe(ofA - 1), 15_000);
      await eventually(() => expect(numbers(cat, "b").at(-1)).toBe(ofB - 1), 15_000);
      expect(numbers(bob, "a")).toEqual(upTo(ofA));
      expect(numbers(cat, "a")).toEqual(upTo(ofA));
      expect(numbers(cat, "b")).toEqual(upTo(ofB));
      const large = ({ heard }: Member) => heard.filter(([event]) => event === "large").length;
      expect(large(bob)).toBe(large(cat));
      for (const { adapter } of nodes) expect(adapter.stats.lost).toBe(0);
      nodes.forEach(errorsOf);
    },
    45_000,
  );

  test("longer than the journal says how many frames are lost, delivers the rest in order, and goes on", async () => {
    const { links, nodes, a, b, bob, cat } = await linked({ journal: { ms: 300 } });
    const over = Promise.withResolvers<void>();
    const counted = count(a, "a", over.promise);
    await eventually(() => expect(numbers(bob, "a").length).toBeGreaterThan(20));
    links[1]?.cut();
    await eventually(() => expect(numbers(cat, "a").length).toBeGreaterThan(150), 10_000);
    links[1]?.heal();
    await eventually(() => expect(b.adapter.stats.lost).toBeGreaterThan(0), 10_000);
    over.resolve();
    const ofA = await counted;
    await eventually(() => expect(numbers(bob, "a").at(-1)).toBe(ofA - 1), 10_000);
    const heard = numbers(bob, "a");
    expect(heard).toEqual([...new Set(heard)].toSorted((one, other) => Number(one) - Number(other)));
    expect(numbers(cat, "a")).toEqual(upTo(ofA));
    // A frame holds one number, or a few where this process was held up.
    expect(b.adapter.stats.lost).toBeLessThanOrEqual(ofA - heard.length);
    expect(errorsOf(b).join()).toMatch(new RegExp(`Lost up to ${b.adapter.stats.lost} frames of peer`));
    nodes.forEach(errorsOf);
  }, 45_000);

  test("of both, longer than the journal, drops what waited too long, delivers the rest, and counts no loss twice", async () => {
    const { links, nodes, a, b, bob } = await linked({ journal: { ms: 1_000 }, heartbeatInterval: 100 });
    a.io.to("red").emit("number", "a", 0);
    await received(bob.client, "number");
    links[0]?.cut();
    links[1]?.cut();
    await eventually(() => expect(a.adapter.stats.connected).toBe(false));
    for (let number = 1; number <= 10; number++) a.io.to(["red", `other${number}`]).emit("number", "a", number);
    await eventually(() => expect(a.adapter.stats.dropped).toBe(10), 3_000);
    a.io.to("red").emit("number", "a", 11);
    for (const link of links) link.heal();
    await eventually(() => expect(numbers(bob, "a")).toEqual([0, 11]), 10_000);
    await eventually(() => expect(errorsOf(a).join()).toContain("Dropped 10 packets"));
    expect(b.adapter.stats.lost).toBe(0); // they never had numbers
    nodes.forEach(errorsOf);
  });

  // What RabbitMQ does where nodes of a cluster lose touch, done to the first message to the room on its way to the broker.
  type Disorder = (publish: () => unknown, confirm: () => void) => (() => unknown) | void;
  const behindTheNext: Disorder = (publish) => publish;
  const toNobody: Disorder = (_, confirm) => void setTimeout(confirm, 20);
  test("of a cluster's nodes loses and reorders nothing, whatever becomes of a message", async () => {
    const strike = async (prefix: string, disorder: Disorder) => {
      let pending: (() => unknown) | void;
      let struck = false;
      const disorderly = tampered(({ key, send, confirm }) => {
        if (!struck && key.endsWith("other0")) {
          struck = true;
          pending = disorder(send, confirm);
          return;
        }
        send();
        pending?.();
        pending = undefined;
      });
      const [a, b] = await Promise.all([start({ prefix, amqpConnection: disorderly }), start({ prefix })]);
      await acquainted([a, b]);
      const bob = await join(b, ["red", "blue"]);
      a.io.to("blue").emit("number", 0);
      await received(bob.client, "number");
      await Bun.sleep(2_100); // what is unconfirmed right after a join may have been published before it
      a.io.to([...upTo(10).map((n) => `other${n}`), "red"]).emit("number", 1);
      await Bun.sleep(0); // each in a frame of its own
      a.io.to("blue").emit("number", 2);
      await Bun.sleep(0);
      a.io.to(["red", "blue"]).emit("number", 3);
      a.io.emit("number", 4);
      expect(await heardFrom(a.io, { bob })).toEqual({ bob: [0, 1, 2, 3, 4].map((number) => ["number", number]) });
      expect(struck).toBe(true);
      expect(b.adapter.stats.replayed).toBeGreaterThan(0);
      expect(b.adapter.stats.lost).toBe(0);
    };
    await Promise.all([strike(prefix, behindTheNext), strike(`${prefix}x`, toNobody)]);
  });

  const stuck: Record<string, (link: Proxy) => void> = {
    "is silent": (link) => link.silence("publishing"),
    "is away": (link) => link.cut("publishing"),
  };
  test.each(Object.entries(stuck))(
    "in which more is emitted than may wait, while the broker %s, keeps the newest and counts the others",
    async (_, strike) => {
      const { links, nodes, a, bob } = await linked({ maxQueued: 2 ** 20, heartbeatInterval: 500 });
      await bob.socket.join("blue");
      const [link] = links;
      if (!link) throw new Error("no link");
      strike(link);
      const text = "x".repeat(1_000);
      for (let number = 0; number < 5_000; number++) {
        a.io.to(number % 2 ? "blue" : "red").emit("number", "a", number, text);
        a.io.to(number % 2 ? "blue" : "red").volatile.emit("late", text);
        if (number % 100 === 0) await Bun.sleep(0);
      }
      expect(a.adapter.stats.queuedBytes).toBeLessThanOrEqual(2 ** 20);
      link.cut("publishing");
      link.heal();
      await eventually(() => expect(numbers(bob, "a").at(-1)).toBe(4_999), 10_000);
      const heard = numbers(bob, "a");
      const { dropped } = a.adapter.stats;
      expect(heard.length + dropped).toBe(5_000);
      expect(heard.slice(-100)).toEqual(upTo(5_000).slice(-100));
      await eventually(() => {
        const reported = (errors.get(a.adapter) ?? []).map(
          ({ message }) => /Dropped (\d+) packets that/.exec(message)?.[1],
        );
        expect(reported.reduce((sum, packets = "0") => sum + Number(packets), 0)).toBe(dropped);
      });
      nodes.forEach(errorsOf);
    },
    20_000,
  );

  test("gives a server nothing that was for another one alone", async () => {
    const { links, a, b, c } = await linked();
    const asked = spyOn(c.adapter, "onMessage");
    links[2]?.cut();
    for (let i = 0; i < 3; i++)
      await b.io
        .timeout(300)
        .fetchSockets()
        .catch(() => {});
    links[2]?.heal();
    await eventually(() => expect(c.adapter.stats.replayed).toBeGreaterThan(0), 5_000);
    a.io.serverSideEmit("last");
    await once(c.io, "last");
    expect(asked.mock.calls.map(([{ type }]) => type).filter((type) => type === "items")).toEqual([]);
    for (const node of [a, b, c]) errorsOf(node);
  });

  test("loses nothing of a peer that was away before it, and came back during it", async () => {
    const { a, b, linkB, bob, emit, until } = await pair();
    linkB.cut();
    await eventually(() => expect(b.adapter.stats.connected).toBe(false));
    await emit(1, 5);
    const { membership } = b.adapter["node"];
    const peer = membership.peers.get(a.adapter.uid);
    if (!peer) throw new Error("they know each other");
    peer.queueGoneAt = performance.now() - 30_000;
    const { log, number } = a.adapter["node"].sender.publisher;
    peer.stream.receive(readFrame(Buffer.from(log.get(number) ?? "")));
    membership.watch(); // as it does every 250 ms
    linkB.heal();
    expect(await until(5)).toEqual(upTo(6));
    expect(numbers(bob, "a")).toEqual(upTo(6));
    expect(errorsOf(b).join()).not.toContain("are lost");
  });

  test("counts what a peer that closes has taken along", async () => {
    const { a, b, linkB, bob } = await pair({}, { requestsTimeout: 300 });
    const { number } = a.adapter["node"].sender.publisher;
    linkB.cut("consuming");
    await eventually(() => expect(b.adapter["node"].receiver.connection.upSince).toBeUndefined());
    const frame = control(a.adapter.uid, JSON.stringify({ type: "bye", number: number + 3 }));
    b.adapter["node"].inbox.onFrame(readFrame(frame), false);
    await eventually(() =>
      expect(errorsOf(b).join()).toMatch(/has closed: frames after number \d+ are lost, 3 at least/),
    );
    expect(b.adapter.stats.lost).toBe(3);
    expect(bob.heard).toHaveLength(1);
  });

  test("whose replay waits in the receiver's queue is not sent again and again", async () => {
    const waiting: (() => void)[] = [];
    let answers = 0;
    let questions = 0;
    const a = ({ content, again, send, confirm }: Passing) => {
      if (!again && !content.includes('"begin"')) return send();
      if (content.includes('"begin"')) answers++;
      waiting.push(send);
      queueMicrotask(confirm);
    };
    const b = ({ content, send }: Passing) => {
      if (content.includes('"ask"')) questions++;
      send();
    };
    const { linkB, emit, until } = await pair({ a, b });
    linkB.cut();
    await emit(1, 99);
    linkB.heal();
    const asked = async (times: number) => {
      const before = questions;
      await eventually(() => expect(questions).toBeGreaterThanOrEqual(before + times), 10_000);
    };
    await asked(3);
    for (const send of waiting.splice(0, 3)) send();
    await asked(2); // for less than before
    for (const send of waiting) send();
    expect(await until(99)).toEqual(upTo(100));
    expect(answers).toBe(1);
  });

  test("of an emitter makes nobody send it packets again", async () => {
    const link = await Proxy.open(broker.port);
    const said: string[] = [];
    const pass = ({ content, send }: Passing) => {
      said.push(content.toString("latin1"));
      send();
    };
    const { a, cat, people } = await crew();
    const emitter = createEmitter({ prefix, amqpConnection: tampered(pass, link.port), onError: () => {} });
    closers.push(async () => {
      await emitter.close();
      link.close();
    });
    await emitter.ready;
    const uid = said[0]!.slice(2, 10);
    said.length = 0;
    const hello = { type: "hello", namespaces: [], revision: 1, reply: true, number: 0, floor: 0, shared: {} };
    await publish(`${prefix}#keys`, `@${uid}`, control("somebody", JSON.stringify(hello)));
    await eventually(() => expect(said.join()).toContain('"hello"')); // what the servers answered has come before
    await publish(`${prefix}#keys`, `@${uid}`, control("somebody", JSON.stringify({ type: "bye", number: 0 })));
    said.length = 0;
    link.cut();
    for (let i = 0; i < 10; i++) a.io.emit("hello");
    await heardFrom(a.io, people);
    link.heal();
    await eventually(() => expect(said.join()).toContain('"hello"'), 10_000);
    emitter.emit("hello");
    await eventually(() => expect(cat.heard).toEqual([["hello"]]));
    expect(said.filter((text) => text.includes('"ask"'))).toEqual([]);
  });

  test("at the start loses nothing of what the servers emit until the broker is there", async () => {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port)]);
    const early = await start();
    const outsider = await join(early, ["red"]);
    for (let n = 0; n < 3; n++) early.io.to("red").emit("n", "too early");
    await eventually(() => expect(early.adapter.stats.unconfirmed).toBe(0));
    await Bun.sleep(50);
    for (const link of links) link.cut();
    const [a, b] = await Promise.all(
      links.map(({ port }) => start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${port}`) })),
    );
    const [near, far] = [a!, b!];
    await Promise.all([once(near.adapter, "error"), once(far.adapter, "error")]);
    const bob = await join(far, ["red"]);
    for (let n = 0; n < 3; n++) near.io.to("red").emit("n", n);
    links[0]?.heal();
    await near.adapter.ready;
    await eventually(() => expect(near.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0 }));
    links[1]?.heal();
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1, 2]), 4_000);
    expect(outsider.heard.map(([, n]) => n).slice(-3)).toEqual([0, 1, 2]);
    await Promise.all([near.adapter.close(), far.adapter.close()]);
    for (const link of links) link.close();
    for (const node of [early, near, far]) errorsOf(node);
  });

  test("that nobody is told of loses nothing of a server that starts before it is noticed", async () => {
    const link = await Proxy.open(broker.port);
    const a = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}?heartbeat=1`) });
    closers.push(async () => {
      await a.adapter.close();
      link.close();
    });
    await a.adapter.ready;
    const bob = await join(a, ["red"]);
    link.silence("consuming");
    const b = await start();
    await b.adapter.ready;
    for (let n = 0; n < 3; n++) b.io.to("red").emit("n", n);
    await eventually(() => expect(a.adapter.stats.reconnects.consuming).toBe(1), 10_000);
    b.io.to("red").emit("n", 3);
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1, 2, 3]), 4_000);
    errorsOf(a);
  }, 20_000);

  test("and another one right after it lose nothing of a server that began to send during the first", async () => {
    const link = await Proxy.open(broker.port);
    const a = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) });
    const bob = await join(a);
    const cut = async () => {
      link.cut();
      await eventually(() => expect(a.adapter.stats.connected).toBe(false));
    };
    await cut();
    const asked = Promise.withResolvers<void>();
    let answers = 0;
    const losingTheFirstAnswer: Pass = ({ content, send, confirm }) => {
      if (!content.includes('"begin"') || ++answers > 1) return send();
      confirm();
      asked.resolve();
    };
    const b = await start({ amqpConnection: tampered(losingTheFirstAnswer) });
    await b.adapter.ready;
    b.io.emit("n", 0);
    await eventually(() => expect(b.adapter.stats).toMatchObject({ queued: 0, unconfirmed: 0, framesSent: 1 }));
    link.heal();
    await asked.promise;
    await cut();
    b.io.emit("n", 1);
    link.heal();
    await eventually(() => expect(bob.heard.map(([, n]) => n)).toEqual([0, 1]), 4_000);
    await a.adapter.close();
    link.close();
    errorsOf(a);
  });

  test("after which a sender closes before the others are back loses nothing", async () => {
    const links = await Promise.all([Proxy.open(broker.port), Proxy.open(broker.port)]);
    const [near, far] = links.map(
      ({ port }) =>
        () =>
          connect(`amqp://guest:guest@127.0.0.1:${port}`),
    );
    const b = await start({ amqpConnection: far! });
    const emitter = createEmitter({ amqpConnection: near!, prefix, onError: () => {} });
    await Promise.all([b.adapter.ready, emitter.ready]);
    const bob = await join(b, ["red"]);
    emitter.to("red").emit("n", 0);
    await received(bob.client, "n");
    for (const link of links) link.cut();
    emitter.to("red").emit("n", 1);
    links[0]?.heal();
    const closed = emitter.close();
    const last = received(bob.client, "n");
    await Bun.sleep(500);
    links[1]?.heal();
    await closed;
    expect(await last).toEqual([1]);
    await b.adapter.close();
    for (const link of links) link.close();
    errorsOf(b);
  });

  test("in which a server closes loses nothing that it emits until then", async () => {
    const link = await Proxy.open(broker.port);
    const { people } = await crew();
    const d = await start({ amqpConnection: () => connect(`amqp://guest:guest@127.0.0.1:${link.port}`) });
    await d.adapter.ready;
    link.cut();
    await eventually(() => expect(d.adapter.stats.connected).toBe(false));
    d.io.to("red").emit("n", 1);
    const arrived = received(people.bob.client, "n");
    const closed = d.io.close();
    link.heal();
    await closed;
    expect(await arrived).toEqual([1]);
    link.close();
    expect(errorsOf(d).join()).not.toContain("confirmed");
  });

  test("whose sender closes while it replays loses nothing", async () => {
    const asked = Promise.withResolvers<void>();
    const { a, b, until } = await missed(500, ({ content, send }) => {
      send();
      if (content.includes('"begin"')) asked.resolve();
    });
    await asked.promise;
    await a.adapter.close();
    expect(await until(499)).toEqual(upTo(500));
    expect(b.adapter.stats.lost).toBe(0);
    expect(errorsOf(b).join()).not.toContain("are lost");
  });
});

test("nothing of all this is left on the broker", nothingIsLeft);
