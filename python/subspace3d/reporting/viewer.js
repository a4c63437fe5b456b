"use strict";

// A view of the points and cameras of a scene, in WebGL 1 without a library. What is drawn and how it is stored is
// described in space_section.py; cameras are OpenCV ones, camera-from-world.

const MAGMA = [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
const FIELD_OF_VIEW = 45 * Math.PI / 180;
const TINT = 0.55; // share of a method's own colour in its points, so that they are not taken for true ones

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const add = (a, b, s = 1) => [a[0] + s * b[0], a[1] + s * b[1], a[2] + s * b[2]];
const unit = (a) => { const n = Math.hypot(...a) || 1; return a.map((x) => x / n); };
const median = (values) => Float64Array.from(values).sort()[values.length >> 1] || 0;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

/** camera = {focal: [fx, fy], centre: [cx, cy], rotation: 9 numbers by rows, translation: 3 numbers} */
function cameraToWorld(camera, point) {
  const r = camera.rotation, p = add(point, camera.translation, -1);
  return [0, 1, 2].map((i) => r[i] * p[0] + r[3 + i] * p[1] + r[6 + i] * p[2]);
}

/** y = scale * rotation * x + translation */
function applySimilarity(alignment, point) {
  const r = alignment.rotation;
  return [0, 1, 2].map((i) => alignment.scale * dot(r.slice(3 * i, 3 * i + 3), point) + alignment.translation[i]);
}

function ramp(share) {
  const at = clamp(share, 0, 1) * (MAGMA.length - 1), low = Math.min(Math.floor(at), MAGMA.length - 2);
  return MAGMA[low].map((x, i) => x + (at - low) * (MAGMA[low + 1][i] - x));
}

function hexColour(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

/** The arrays of one scene; see space_section.py for their order. */
function decodeScene(record) {
  const text = atob(record.data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  let at = 0;
  const take = (type, count) => {
    const end = at + count * type.BYTES_PER_ELEMENT, array = new type(bytes.buffer.slice(at, end));
    at = end;
    return array;
  };
  const n = record.points, scene = { ...record, pixels: take(Uint32Array, n), colours: take(Uint8Array, 3 * n) };
  scene.layers = record.layers.map((layer) => layer && {
    ...layer, depths: take(Uint16Array, n), confidence: layer.confidence ? take(Uint8Array, n) : null,
  });
  return scene;
}

/** World positions, 3 numbers per point, from the true cameras where the layer has none of its own; NaN where the depth
 * is not positive or the layer cannot be placed. */
function layerPositions(scene, index, placement) {
  const layer = scene.layers[index], [height, width] = scene.size, positions = new Float32Array(3 * scene.points);
  const truly = placement === "true" || index === 0 || !layer.cameras, cameras = truly ? scene.layers[0].cameras : layer.cameras;
  const step = Math.log(layer.high / layer.low) / 65534, scale = truly ? layer.scale : 1;
  if (!truly && !layer.alignment) return positions.fill(NaN);
  for (let i = 0; i < scene.points; i++) {
    const pixel = scene.pixels[i], frame = Math.floor(pixel / (height * width)), column = pixel % width;
    const row = Math.floor(pixel / width) % height, camera = cameras[frame], code = layer.depths[i];
    const depth = code ? scale * layer.low * Math.exp(step * (code - 1)) : NaN;
    const x = (column + 0.5 - camera.centre[0]) / camera.focal[0], y = (row + 0.5 - camera.centre[1]) / camera.focal[1];
    const point = cameraToWorld(camera, [x * depth, y * depth, depth]);
    positions.set(truly ? point : applySimilarity(layer.alignment, point), 3 * i);
  }
  return positions;
}

/** End points of the edges of one camera: the image at the given depth, its centre, and a mark above its upper edge. */
function frustum(camera, size, depth, alignment) {
  const corner = (u, v) => [(u - camera.centre[0]) / camera.focal[0] * depth, (v - camera.centre[1]) / camera.focal[1] * depth, depth];
  const [h, w] = size, inCamera = [[0, 0, 0], corner(0, 0), corner(w, 0), corner(w, h), corner(0, h)];
  inCamera.push(corner(0.35 * w, -0.06 * h), corner(0.65 * w, -0.06 * h), corner(0.5 * w, -0.28 * h));
  const points = inCamera.map((p) => cameraToWorld(camera, p)).map((p) => alignment ? applySimilarity(alignment, p) : p);
  const edges = [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1], [5, 6], [6, 7], [7, 5]];
  return edges.flatMap(([a, b]) => [...points[a], ...points[b]]);
}

const VERTEX = `
attribute vec3 position; attribute vec3 colour; uniform mat4 view; uniform float size; varying vec3 shade;
void main() { gl_Position = view * vec4(position, 1.0); shade = colour; gl_PointSize = clamp(size / gl_Position.w, 1.5, 40.0); }`;
const FRAGMENT = `
precision mediump float; varying vec3 shade; uniform float round;
void main() {
  vec2 p = gl_PointCoord - 0.5;
  if (round > 0.5 && dot(p, p) > 0.25) discard;
  gl_FragColor = vec4(shade, 1.0);
}`;

class SceneViewer {
  constructor(root, data) {
    this.root = root;
    this.data = data;
    this.canvas = root.querySelector("canvas");
    this.find = (name) => root.querySelector(`[data-${name}]`);
    // the drawing is kept so that the page can be printed and the picture saved
    this.gl = this.canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
    if (!this.gl) return this.say("This browser shows no WebGL, so the points cannot be drawn. All else on the page works without it.");
    this.program = this.link();
    this.layers = [];
    this.listen();
    this.openScene(0);
    new ResizeObserver(() => this.request()).observe(this.canvas);
    this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.canvas.addEventListener("webglcontextrestored", () => { this.program = this.link(); this.rebuild(); });
  }

  say(text) {
    const message = this.find("message");
    message.textContent = text;
    message.hidden = false;
    this.canvas.hidden = true;
  }

  link() {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    const place = (name) => gl.getUniformLocation(program, name);
    return {
      position: gl.getAttribLocation(program, "position"), colour: gl.getAttribLocation(program, "colour"),
      view: place("view"), size: place("size"), round: place("round"),
    };
  }

  // ---- what is shown -----------------------------------------------------------------------------------------------

  openScene(index) {
    this.scene = decodeScene(this.data.scenes[index]);
    this.truth = layerPositions(this.scene, 0, "true");
    this.root.querySelectorAll("[data-layer]").forEach((box) => { box.disabled = !this.scene.layers[box.dataset.layer]; });
    this.frame();
    this.rebuild();
  }

  /** Where the view starts: around the middle of the true points, beside and above the first true camera, so that it hides nothing. */
  frame() {
    const axis = (k) => { const v = []; for (let i = k; i < this.truth.length; i += 3) if (this.truth[i] === this.truth[i]) v.push(this.truth[i]); return v; };
    this.middle = [0, 1, 2].map((k) => median(axis(k)));
    const away = [];
    for (let i = 0; i < this.truth.length; i += 3) away.push(Math.hypot(...add([...this.truth.slice(i, i + 3)], this.middle, -1)));
    this.radius = Float64Array.from(away).sort()[Math.floor(0.95 * (away.length - 1))] || 1;
    const cameras = this.scene.layers[0].cameras;
    const apart = median(cameras.map((camera) => Math.hypot(...add(cameraToWorld(camera, [0, 0, 0]), this.middle, -1))));
    this.frustumDepth = clamp(0.12 * apart, 0.12 * this.radius, 0.5 * this.radius);
    const reach = Math.max(this.radius, Math.min(0.5 * apart, 2 * this.radius));
    this.up = unit(cameras.reduce((sum, camera) => add(sum, camera.rotation.slice(3, 6), -1), [0, 0, 0]));
    const first = cameras[0], back = unit(add(cameraToWorld(first, [0, 0, 0]), this.middle, -1));
    this.side = unit(cross(this.up, Math.abs(dot(this.up, back)) > 0.99 ? first.rotation.slice(0, 3) : back));
    this.front = cross(this.side, this.up);
    const pitch = Math.asin(clamp(dot(this.up, back), -1, 1)) + 0.2;
    this.home = { yaw: 0.55, pitch: clamp(pitch, -1.5, 1.5), distance: 1.25 * reach / Math.tan(FIELD_OF_VIEW / 2) };
    this.reset();
  }

  reset() {
    Object.assign(this, this.home, { target: this.middle });
    this.request();
  }

  rebuild() {
    const gl = this.gl, placement = this.find("placement").value, cameras = this.find("cameras").checked;
    const least = this.find("confidence").valueAsNumber * 2.55;
    this.layers.forEach((layer) => { gl.deleteBuffer(layer.points); gl.deleteBuffer(layer.lines); });
    this.layers = [];
    const counts = [];
    this.root.querySelectorAll("[data-layer]").forEach((box) => {
      const index = Number(box.dataset.layer), layer = this.scene.layers[index];
      if (!box.checked || !layer) return;
      const built = this.points(index, placement, least);
      if (cameras) built.segments = this.frusta(index, placement);
      const name = this.data.names[index], seen = layer.cameras ? "" : ", seen from the true cameras: its own are not predicted";
      const lost = placement !== "true" && layer.cameras && !layer.alignment;
      counts.push(lost ? `${name}: no alignment, not placed` : `${name}: ${built.count.toLocaleString("en")} points${seen}`);
      this.layers.push(this.upload(built));
    });
    this.find("status").textContent = counts.join("; ") || "Nothing is switched on.";
    this.request();
  }

  points(index, placement, least) {
    const scene = this.scene, layer = scene.layers[index], mode = this.find("colour").value;
    const own = hexColour(this.data.colours[index]), all = layerPositions(scene, index, placement);
    const positions = new Float32Array(all.length), colours = new Uint8Array(all.length);
    let count = 0;
    for (let i = 0; i < scene.points; i++) {
      const at = [...all.slice(3 * i, 3 * i + 3)];
      if (at[0] !== at[0] || (layer.confidence && layer.confidence[i] < least)) continue;
      const image = scene.colours.slice(3 * i, 3 * i + 3);
      const error = () => ramp(Math.hypot(...add(at, [...this.truth.slice(3 * i, 3 * i + 3)], -1)) / (this.data.error * this.radius));
      const tinted = () => [...image].map((x, k) => index ? (1 - TINT) * x + TINT * own[k] : x);
      colours.set({ image: () => image, tinted, source: () => own, error }[mode](), 3 * count);
      positions.set(at, 3 * count++);
    }
    return { positions, colours, count, segments: [], own };
  }

  frusta(index, placement) {
    const layer = this.scene.layers[index];
    if (index > 0 && (placement === "true" || !layer.alignment || !layer.cameras)) return [];
    // an aligned camera is drawn as large as a true one
    const depth = this.frustumDepth / (index ? layer.alignment.scale : 1);
    return layer.cameras.flatMap((camera) => frustum(camera, this.scene.size, depth, index ? layer.alignment : null));
  }

  upload({ positions, colours, count, segments, own }) {
    const gl = this.gl, vertices = segments.length / 3;
    const fill = (xyz, rgb, n) => {
      const buffer = gl.createBuffer(), bytes = new Uint8Array(16 * n), floats = new Float32Array(bytes.buffer);
      for (let i = 0; i < n; i++) {
        floats.set([xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]], 4 * i);
        bytes.set([rgb(i, 0), rgb(i, 1), rgb(i, 2), 255], 16 * i + 12);
      }
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferData(gl.ARRAY_BUFFER, bytes, gl.STATIC_DRAW);
      return buffer;
    };
    return { points: fill(positions, (i, k) => colours[3 * i + k], count), count, lines: fill(segments, (i, k) => own[k], vertices), vertices };
  }

  // ---- drawing -----------------------------------------------------------------------------------------------------

  request() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); });
  }

  axes() {
    const flat = add(this.front.map((x) => x * Math.cos(this.yaw)), this.side, Math.sin(this.yaw));
    const back = add(flat.map((x) => x * Math.cos(this.pitch)), this.up, Math.sin(this.pitch));
    const right = unit(cross(this.up, back));
    return { right, above: cross(back, right), back, eye: add(this.target, back, this.distance) };
  }

  viewMatrix(aspect) {
    const { right, above, back, eye } = this.axes(), near = 0.02 * this.distance, far = this.distance + 60 * this.radius;
    // narrow canvases see as much as square ones
    const f = Math.min(1, aspect) / Math.tan(FIELD_OF_VIEW / 2), a = (far + near) / (near - far), b = 2 * far * near / (near - far);
    const rows = [right.map((x) => x * f / aspect), above.map((x) => x * f), back.map((x) => x * a), back.map((x) => -x)];
    const shift = rows.map((row, i) => -dot(row, eye) + (i === 2 ? b : 0));
    return new Float32Array([0, 1, 2].flatMap((k) => rows.map((row) => row[k])).concat(shift));
  }

  draw() {
    const gl = this.gl, canvas = this.canvas, ratio = Math.min(2, window.devicePixelRatio || 1);
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio)), height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    gl.viewport(0, 0, width, height);
    const paper = getComputedStyle(canvas).backgroundColor.match(/[\d.]+/g).slice(0, 3).map((x) => x / 255);
    gl.clearColor(...paper, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.uniformMatrix4fv(this.program.view, false, this.viewMatrix(width / height));
    gl.uniform1f(this.program.size, this.find("size").valueAsNumber * 0.004 * this.radius * Math.min(width, height));
    for (const layer of this.layers) {
      this.drawBuffer(layer.points, gl.POINTS, layer.count, 1);
      this.drawBuffer(layer.lines, gl.LINES, layer.vertices, 0);
    }
  }

  drawBuffer(buffer, kind, count, round) {
    const gl = this.gl, { position, colour } = this.program;
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.enableVertexAttribArray(position);
    gl.enableVertexAttribArray(colour);
    gl.vertexAttribPointer(position, 3, gl.FLOAT, false, 16, 0);
    gl.vertexAttribPointer(colour, 3, gl.UNSIGNED_BYTE, true, 16, 12);
    gl.uniform1f(this.program.round, round);
    gl.drawArrays(kind, 0, count);
  }

  // ---- moving ------------------------------------------------------------------------------------------------------

  turn(yaw, pitch) {
    this.yaw += yaw;
    this.pitch = clamp(this.pitch + pitch, -1.55, 1.55);
    this.request();
  }

  /** Shares of the canvas' shorter side. */
  pan(x, y) {
    const { right, above } = this.axes(), reach = 2 * this.distance * Math.tan(FIELD_OF_VIEW / 2);
    this.target = add(add(this.target, right, -x * reach), above, y * reach);
    this.request();
  }

  zoom(factor) {
    this.distance = clamp(this.distance * factor, 0.03 * this.radius, 60 * this.radius);
    this.request();
  }

  listen() {
    const canvas = this.canvas, held = new Map();
    const side = () => Math.min(canvas.clientWidth, canvas.clientHeight) || 1;
    canvas.addEventListener("pointerdown", (event) => {
      held.set(event.pointerId, event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = held.get(event.pointerId);
      if (!before) return;
      const x = (event.clientX - before.clientX) / side(), y = (event.clientY - before.clientY) / side();
      if (held.size === 2) {
        const other = [...held.values()].find((item) => item.pointerId !== event.pointerId);
        const apart = (item) => Math.hypot(item.clientX - other.clientX, item.clientY - other.clientY) || 1;
        this.zoom(apart(before) / apart(event));
        this.pan(x / 2, y / 2);
      } else if (event.buttons & 6 || event.shiftKey) this.pan(x, y);
      else this.turn(-3 * x, 3 * y);
      held.set(event.pointerId, event);
    });
    const release = (event) => held.delete(event.pointerId);
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) canvas.addEventListener(name, release);
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    // a page that is scrolled past the view is not held up by it: the wheel zooms once the view has been clicked
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      this.zoom(Math.exp(0.0015 * clamp(event.deltaY * (event.deltaMode ? 30 : 1), -300, 300)));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    this.find("scene").addEventListener("change", (event) => this.openScene(Number(event.target.value)));
    for (const name of ["placement", "colour", "cameras"]) this.find(name).addEventListener("change", () => this.rebuild());
    this.root.querySelectorAll("[data-layer]").forEach((box) => {
      box.addEventListener("change", () => this.rebuild());
      box.parentElement.querySelector(".swatch").style.background = this.data.colours[box.dataset.layer];
    });
    this.find("confidence").addEventListener("input", () => this.rebuild());
    this.find("size").addEventListener("input", () => this.request());
    this.find("reset").addEventListener("click", () => this.reset());
    document.addEventListener("themechange", () => this.request());
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const zooms = { "+": 0.9, "=": 0.9, "-": 1 / 0.9, "_": 1 / 0.9 };
    const arrow = arrows[event.key];
    if (arrow && event.shiftKey) this.pan(0.05 * arrow[0], 0.05 * arrow[1]);
    else if (arrow) this.turn(0.1 * arrow[0], -0.1 * arrow[1]);
    else if (zooms[event.key]) this.zoom(zooms[event.key]);
    else if (event.key === "Home" || event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }
}

{
  const root = document.querySelector("[data-viewer]");
  if (root) window.sceneViewer = new SceneViewer(root, JSON.parse(document.getElementById("space-data").textContent));
}
