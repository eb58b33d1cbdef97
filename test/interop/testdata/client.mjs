// An HTTP/2 CONNECT client of Node's own http2 module: node client.mjs '{"addr": "IP:PORT", "pem": {...}, "authority": ..., "mode": ...}'.
// It prints one line of JSON: what it saw. interop.go's nodeClient starts it; the modes are described there.
import crypto from 'node:crypto';
import fs from 'node:fs';
import http2 from 'node:http2';

const o = JSON.parse(process.argv[2]);
const { NGHTTP2_CANCEL } = http2.constants;

const session = http2.connect(`https://${o.addr}`, {
  cert: o.pem.cert && fs.readFileSync(o.pem.cert),
  key: o.pem.key && fs.readFileSync(o.pem.key),
  ca: fs.readFileSync(o.pem.roots),
  checkServerIdentity: () => undefined, // the certificates of a mesh name no hosts
  settings: o.settings,
  paddingStrategy: o.padding ? http2.constants.PADDING_STRATEGY_MAX : http2.constants.PADDING_STRATEGY_NONE,
  peerMaxConcurrentStreams: 100,
});
const sessionError = new Promise((resolve) => session.on('error', (e) => resolve(e.code ?? String(e))));
const connected = new Promise((resolve) => session.on('connect', resolve));
connected.then(() => o.window && session.setLocalWindowSize(o.window));

// open sends one CONNECT; the promise is for its stream and the response's headers.
function open(authority, more) {
  return new Promise((resolve, reject) => {
    const stream = session.request({ ':method': 'CONNECT', ':authority': authority, ...more }, { endStream: false });
    stream.on('response', (headers) => resolve({ stream, headers }));
    stream.on('error', reject);
    stream.on('close', () => reject(new Error(`closed before the answer, code ${stream.rstCode}`)));
  });
}

// send writes n bytes that nothing can compress, with backpressure, and resolves to their hash.
async function send(stream, n, seed) {
  const key = crypto.createHash('sha256').update(String(seed)).digest();
  const cipher = crypto.createCipheriv('aes-256-ctr', key, Buffer.alloc(16));
  const hash = crypto.createHash('sha256');
  const zero = Buffer.alloc(65536);
  for (let left = n; left > 0; left -= zero.length) {
    const piece = cipher.update(left < zero.length ? zero.subarray(0, left) : zero);
    hash.update(piece);
    if (!stream.write(piece)) await once(stream, 'drain');
  }
  return hash.digest('hex');
}

function once(stream, event) {
  return new Promise((resolve, reject) => {
    const done = (f) => (x) => {
      stream.off(event, good);
      stream.off('close', bad);
      f(x);
    };
    const good = done(resolve);
    const bad = done(() => reject(new Error(`closed while waiting for ${event}, code ${stream.rstCode}`)));
    stream.once(event, good);
    stream.once('close', bad);
  });
}

// receive reads to the end and resolves to length and hash.
async function receive(stream) {
  const hash = crypto.createHash('sha256');
  let n = 0;
  for await (const piece of stream) {
    n += piece.length;
    hash.update(piece);
  }
  return { n, hash: hash.digest('hex') };
}

// exchange sends and receives at once; our end of the stream follows the data.
async function exchange(authority, n, seed) {
  const { stream, headers } = await open(authority);
  if (headers[':status'] !== 200) throw new Error(`status ${headers[':status']}`);
  const [sent, got] = await Promise.all([send(stream, n, seed).then((h) => (stream.end(), h)), receive(stream)]);
  if (got.n !== n || got.hash !== sent) throw new Error(`sent ${n} ${sent}, got ${got.n} ${got.hash}`);
  return { rst: stream.rstCode };
}

const modes = {
  // o.streams exchanges with an echo at the same time
  echo: async () => ({ streams: (await Promise.all(Array.from({ length: o.streams }, (_, i) => exchange(o.authority, o.bytes, i)))).length }),

  // sends, ends, and then reads what the application answers
  clientFirst: async () => {
    const { stream } = await open(o.authority);
    const hash = await send(stream, o.bytes, 1);
    stream.end();
    let text = '';
    for await (const piece of stream) text += piece;
    return { hash, text };
  },

  // reads to the end, and only then sends and ends
  serverFirst: async () => {
    const { stream } = await open(o.authority);
    let text = '';
    stream.on('data', (d) => (text += d));
    await once(stream, 'end');
    const hash = await send(stream, o.bytes, 2);
    stream.end();
    await new Promise((resolve) => stream.on('close', resolve));
    return { hash, text, rst: stream.rstCode };
  },

  // reads to the end without sending
  read: async () => {
    const { stream } = await open(o.authority);
    stream.end();
    return receive(stream);
  },

  // the answers to o.authorities, and of what o.authority gives
  status: async () => {
    const statuses = [];
    for (const authority of o.authorities) {
      const { stream, headers } = await open(authority);
      statuses.push(headers[':status']);
      stream.close();
    }
    const { stream, headers } = await open(o.authority, o.headers);
    stream.close();
    return { statuses, headers };
  },

  // gives one of two streams up in the middle; the other must not notice
  cancel: async () => {
    const { stream } = await open(o.authority);
    stream.on('error', () => {});
    let n = 0;
    await new Promise((resolve) => stream.on('data', (d) => (n += d.length) > 1 << 20 && resolve()));
    stream.close(NGHTTP2_CANCEL);
    await new Promise((resolve) => stream.on('close', resolve));
    await exchange(o.echo, 1 << 20, 3);
    return { n };
  },

  // dies in the middle
  vanish: async () => {
    const { stream } = await open(o.authority);
    let n = 0;
    await new Promise((resolve) => stream.on('data', (d) => (n += d.length) > 1 << 20 && resolve()));
    process.stdout.write(JSON.stringify({ n }) + '\n', () => process.kill(process.pid, 'SIGKILL'));
    await new Promise(() => {});
  },

  // stays idle for o.idle ms but for o.pings of its own, then uses the connection
  pings: async () => {
    await connected;
    for (let i = 0; i < o.pings; i++) {
      await new Promise((resolve, reject) => {
        const ok = session.ping((err) => (err ? reject(err) : resolve()));
        if (!ok) reject(new Error('ping was not sent'));
      });
      await new Promise((resolve) => setTimeout(resolve, o.idle / o.pings));
    }
    await exchange(o.authority, 1 << 20, 4);
    return {};
  },
};

try {
  const result = await Promise.race([
    modes[o.mode](),
    sessionError.then((e) => Promise.reject(new Error(`session: ${e}`))),
  ]);
  console.log(JSON.stringify(result));
  session.close();
} catch (e) {
  console.log(JSON.stringify({ error: e.message }));
  session.destroy();
}
