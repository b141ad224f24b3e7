"use strict";
// Sends a file or a recording to the server and shows what it answers. Texts of the answer are set as text, never as HTML.
const at = (id) => document.getElementById(id);
const { maxBytes, maxMb, maxS } = document.querySelector("main").dataset;
const voices = [];  // names and embeddings of the files before, of a model that compares speakers
let latest = 0;

const element = (name, content, properties = {}) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...[content].flat());
  return made;
};
const say = (status, error = "", isShown = true) => {
  at("status").textContent = status;
  at("status").classList.toggle("unseen", !isShown);
  at("error").textContent = error;
};

async function ask(file, name) {
  const turn = ++latest;
  at("answer").hidden = true;
  if (file.size > Number(maxBytes)) {
    say("", `${name} is larger than the ${maxMb} MB that are taken here.`);
    return;
  }
  say(`Listening to ${name} …`);
  const form = new FormData();
  form.append("file", file, name);
  const width = Math.min(4000, Math.max(240, Math.floor(document.querySelector("main").clientWidth - 2 * padding())));
  let answer;
  try {
    const response = await fetch(`predict?top=10&spectrogram=${width}`, { method: "POST", body: form });
    answer = await response.json();
  } catch (error) {
    answer = { error: `no answer from the server: ${error.message}` };
  }
  if (turn !== latest) return;  // another file was chosen meanwhile
  if (answer.error) say("", `${name}: ${answer.error}`);
  else show(answer, file);
}

const padding = () => parseFloat(getComputedStyle(document.querySelector("main")).paddingLeft);

function show(answer, file) {
  at("heading").textContent = `${answer.file}, ${answer.seconds.toFixed(2)} s`;
  URL.revokeObjectURL(at("sound").src);
  at("sound").src = URL.createObjectURL(file);
  at("sound").setAttribute("aria-label", `The sound of ${answer.file}`);
  const [words, details] = parts(answer);
  const score = answer.score === undefined ? [] : [element("small", ` score ${answer.score.toFixed(2)}`)];
  at("result").replaceChildren(words, ...score);
  at("result").classList.toggle("long", Boolean(answer.segments || answer.text));
  at("details").replaceChildren(...details);
  const svg = new DOMParser().parseFromString(answer.spectrogram, "text/html").body.firstElementChild;
  svg.style.width = `${svg.viewBox.baseVal.width * 96 / 72}px`;
  at("picture").replaceChildren(svg);
  at("answer").hidden = false;
  if (at("picture").scrollWidth > at("picture").clientWidth) {  // only then it is a stop of the keyboard
    Object.assign(at("picture"), { tabIndex: 0, role: "region", ariaLabel: "Spectrogram, scrolls to the side" });
  } else {
    for (const name of ["tabindex", "role", "aria-label"]) at("picture").removeAttribute(name);
  }
  say(`${answer.file}: ${at("result").textContent}`, "", false);  // for who can't see it
}

// What stands in large letters, and what stands below the picture, by the kind of answer.
function parts(answer) {
  if (answer.slots) {
    const tables = Object.entries(answer.slots).map(([slot, own]) => scores(slot, own.top));
    return [answer.label, tables];
  }
  if (answer.top) return [answer.label, [scores("Scores", answer.top)]];
  if (answer.segments) return [labels(answer.segments), [timeline(answer.segments)]];
  if (answer.embedding) return alike(answer);
  return [answer.text === undefined ? answer.label : answer.text || "(nothing)", []];
}

const cell = (content, className = "number") => element("td", content, { className });

function bars(caption, rows, share) {
  const body = rows.map(([label, score]) => {
    const bar = element("i", []);
    bar.style.width = `${100 * share(score)}%`;
    const drawn = cell(element("span", bar), "bar");
    drawn.setAttribute("aria-hidden", "true");
    return element("tr", [element("th", label, { scope: "row" }), cell(score.toFixed(3)), drawn]);
  });
  return element("table", [element("caption", caption), element("tbody", body)], { className: "scores" });
}

const scores = (caption, top) => bars(caption, top.map((each) => [each.label, each.score]), (score) => score);

function labels(segments) {
  const shown = segments.slice(0, 60).map((segment) => segment.label).join(" ");
  return segments.length > 60 ? `${shown} …` : shown;
}

function timeline(segments) {
  const head = ["Start, s", "End, s", "Label", "Score"].map((name, place) => element("th", name, { scope: "col", className: place === 2 ? "" : "number" }));
  const rows = segments.map((each) => element("tr", [
    cell(each.start.toFixed(3)), cell(each.end.toFixed(3)), element("td", each.label), cell(each.score.toFixed(2)),
  ]));
  const table = element("table", [element("thead", element("tr", head)), element("tbody", rows)], { className: "times" });
  return element("details", [element("summary", `${segments.length} segments with their times`), table]);
}

function alike(answer) {
  const cosines = voices.map(([name, embedding]) => [name, embedding.reduce((sum, each, place) => sum + each * answer.embedding[place], 0)]);
  voices.push([answer.file, answer.embedding]);
  if (!cosines.length) return ["The first voice: give another file to compare it with", []];
  const [[name, cosine]] = cosines.sort(([, one], [, other]) => other - one);
  return [`Most like ${name}, cosine ${cosine.toFixed(3)}`, [bars("Cosine with the files before", cosines, (each) => Math.max(0, each))]];
}

// A chosen and a dropped file

at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) ask(file, file.name);
});
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
document.addEventListener("dragover", () => at("drop").classList.add("over"));
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer.files;
  if (file) ask(file, file.name);
});
at("drop").addEventListener("submit", (event) => event.preventDefault());

// A recording: what the browser records, in a form of its own, becomes a WAV of 16 bits

let recorder = null;
at("record").hidden = !(navigator.mediaDevices && window.MediaRecorder);  // pages without TLS have them on localhost alone
at("record").addEventListener("click", async () => {
  if (recorder) {
    recorder.stop();
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    recorder = new MediaRecorder(stream);
    const pieces = [];
    recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
    recorder.addEventListener("stop", async () => {
      clearTimeout(end);
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      pressed(false);
      try {
        await ask(await wave(new Blob(pieces)), `recording ${new Date().toTimeString().slice(0, 8)}`);
      } catch (error) {
        say("", `The recording can't be used: ${error.message}`);
      }
    });
    const end = setTimeout(() => recorder.stop(), 1000 * Number(maxS) - 500);
    recorder.start();
    pressed(true);
    say("Recording … press Stop when you have spoken.");
  } catch (error) {
    recorder = null;
    say("", `There is no microphone to record with: ${error.message}`);
  }
});

function pressed(is) {
  at("record").textContent = is ? "Stop" : "Record";
  at("record").setAttribute("aria-pressed", is);
}

async function wave(blob) {
  const context = new AudioContext();
  const decoded = await context.decodeAudioData(await blob.arrayBuffer());
  await context.close();
  const channels = Array.from({ length: decoded.numberOfChannels }, (_, place) => decoded.getChannelData(place));
  const view = new DataView(new ArrayBuffer(44 + 2 * decoded.length));
  const write = (place, text) => [...text].forEach((letter, offset) => view.setUint8(place + offset, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, 36 + 2 * decoded.length, true);
  write(8, "WAVEfmt ");
  [[16, 16, 4], [20, 1, 2], [22, 1, 2], [24, decoded.sampleRate, 4], [28, 2 * decoded.sampleRate, 4], [32, 2, 2], [34, 16, 2]]
    .forEach(([place, value, bytes]) => (bytes === 4 ? view.setUint32(place, value, true) : view.setUint16(place, value, true)));
  write(36, "data");
  view.setUint32(40, 2 * decoded.length, true);
  for (let place = 0; place < decoded.length; place += 1) {
    const mean = channels.reduce((sum, channel) => sum + channel[place], 0) / channels.length;
    view.setInt16(44 + 2 * place, Math.round(32767 * Math.max(-1, Math.min(1, mean))), true);
  }
  return new Blob([view], { type: "audio/wav" });
}
