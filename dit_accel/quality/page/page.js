"use strict";
// All players of a clip follow its first one. Nothing plays unasked, whatever motion the reader prefers.
class Group {
  constructor(article) {
    this.article = article;
    this.videos = [...article.querySelectorAll("video")];
    this.frames = Number(article.dataset.frames);
    this.fps = Number(article.dataset.fps);
    this.speed = 1;
    this.playing = false;
    this.turning = false; // between the end and the beginning
    if (!this.videos.length) return;
    const find = (name) => article.querySelector("." + name);
    this.button = find("play");
    this.scrub = find("scrub");
    this.where = find("where");
    this.button.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    find("back").addEventListener("click", () => this.step(-1));
    find("forth").addEventListener("click", () => this.step(1));
    find("worst").addEventListener("click", () => this.show(Number(article.dataset.worst)));
    find("speed").addEventListener("change", (event) => { this.speed = Number(event.target.value); this.even(); });
    this.scrub.addEventListener("input", () => this.show(Number(this.scrub.value)));
    article.addEventListener("keydown", (event) => {
      if (event.key === ",") this.step(-1);
      if (event.key === ".") this.step(1);
    });
    this.videos[0].addEventListener("ended", () => this.again());
  }

  get frame() {
    return Math.max(0, Math.min(this.frames - 1, Math.floor(this.videos[0].currentTime * this.fps + 1e-3)));
  }

  // Loads the videos of a clip that was not shown before.
  open() {
    for (const video of this.videos) {
      if (video.dataset.src) { video.src = video.dataset.src; delete video.dataset.src; }
    }
    if (this.videos.length) this.show(Number(this.scrub.value));
  }

  // In the middle of a frame, where rounding cannot reach its neighbour.
  async seek(frame) {
    const time = (frame + 0.5) / this.fps;
    await Promise.all(this.videos.map((video) => new Promise((done) => {
      const go = () => { video.addEventListener("seeked", done, { once: true }); video.currentTime = time; };
      if (video.readyState >= 1) go(); else video.addEventListener("loadedmetadata", go, { once: true });
    })));
  }

  show(frame) {
    this.pause();
    this.tell(frame);
    return this.seek(frame);
  }

  step(by) {
    return this.show((this.frame + by + this.frames) % this.frames);
  }

  async play() {
    this.playing = true;
    this.button.textContent = "Pause";
    if (this.frame >= this.frames - 1) await this.seek(0);
    this.even();
    await Promise.all(this.videos.map((video) => video.play().catch(() => {}))); // a pause may come first
    this.follow();
  }

  pause() {
    this.playing = false;
    this.button.textContent = "Play";
    for (const video of this.videos) video.pause();
  }

  async again() {
    if (!this.playing || this.turning) return;
    this.turning = true;
    for (const video of this.videos) video.pause();
    await this.seek(0);
    this.turning = false;
    if (this.playing) await this.play();
  }

  even() {
    for (const video of this.videos) video.playbackRate = this.speed;
  }

  // Once a picture: who is late runs faster, who is early slower; who is a frame away is put back.
  follow() {
    cancelAnimationFrame(this.next);
    const [first, ...others] = this.videos;
    const beat = () => {
      if (!this.playing) return;
      if (!this.turning) {
        this.tell(this.frame);
        for (const video of others) {
          const apart = (video.currentTime - first.currentTime) * this.fps; // frames
          if (Math.abs(apart) > 1 && !video.seeking) video.currentTime = first.currentTime;
          const rate = Math.abs(apart) < 0.1 ? 1 : 1 - Math.max(-0.5, Math.min(0.5, apart));
          if (video.playbackRate !== this.speed * rate) video.playbackRate = this.speed * rate;
        }
      }
      this.next = requestAnimationFrame(beat);
    };
    beat();
  }

  tell(frame) {
    this.scrub.value = frame;
    this.where.textContent = `frame ${frame} of ${this.frames - 1}`;
  }
}

const groups = [...document.querySelectorAll(".clip")].map((article) => new Group(article));
if (groups.length) groups[0].open();

const choose = document.getElementById("choose");
choose?.addEventListener("change", () => {
  groups.forEach((group, i) => {
    if (group.playing) group.pause();
    group.article.hidden = i !== Number(choose.value);
  });
  groups[Number(choose.value)].open();
});

document.getElementById("theme").addEventListener("change", (event) => {
  document.documentElement.dataset.theme = event.target.value;
});

document.getElementById("download").addEventListener("click", (event) => {
  const text = document.getElementById("raw-json").textContent;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = event.target.dataset.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
