"use strict";
// What if: between the plan's own rows, by the logarithm of how many accelerators; README of the page says what is interpolated.
const given = JSON.parse(document.getElementById("given").textContent);
const at = (rows, key, x, log) => {
  const known = rows.filter(row => row[key] !== null);
  if (!known.length) return null;
  const place = row => log ? Math.log(row.x) : row.x, here = log ? Math.log(x) : x;
  if (here <= place(known[0])) return known[0][key];
  for (let i = 1; i < known.length; i++) {
    const low = known[i - 1], high = known[i];
    if (here <= place(high)) {
      const share = (here - place(low)) / (place(high) - place(low));
      return key === "speed" && log ? Math.exp((1 - share) * Math.log(low[key]) + share * Math.log(high[key])) : (1 - share) * low[key] + share * high[key];
    }
  }
  return known[known.length - 1][key];
};
// First order: a save every sqrt(2 save / rate) seconds costs sqrt(2 save rate), and each failure its recovery.
const kept = (count, failures) => {
  if (failures === null || given.save === null || given.recovery === null) return 1;
  const rate = failures / 1000 / 86400 * count;
  return Math.max(0, 1 - Math.sqrt(2 * given.save * rate) - rate * given.recovery);
};
const answer = asked => {
  const speed = given.speed_factor * at(given.rows, "speed", asked.count, true) * (asked.cap === null ? 1 : at(given.caps, "speed", asked.cap, false) / given.cap_speed);
  const rows = at(given.rows, "goodput", asked.count, true), first = kept(asked.count, given.base.failures), start = kept(given.base.count, given.base.failures);
  const base = rows !== null ? given.goodput_factor * rows : given.goodput === null ? null : start > 0 ? given.goodput * first / start : null;
  const goodput = base === null ? null : Math.min(1, first > 0 ? base * kept(asked.count, asked.failures) / first : 0);
  const each = given.it_watts === null ? null : given.it_watts + (asked.cap === null ? 0 : at(given.caps, "watts", asked.cap, false) - given.cap_watts);
  const it = each === null ? null : each * asked.count, facility = it === null || asked.pue === null ? null : it * asked.pue;
  const retained = speed * (goodput === null ? 1 : goodput), days = retained > 0 ? given.tokens / retained / 86400 : null;
  const mwh = facility === null || days === null ? null : given.mwh_factor * facility * days * 24 / 1e6;
  return {speed, goodput, days: days === null ? null : given.days_factor * days, megawatts: facility === null ? null : facility / 1e6, efficiency: facility === null ? null : given.efficiency_factor * retained / facility * 1e6, mwh,
    eur: mwh === null || asked.price === null ? null : mwh * asked.price, tco2: mwh === null || asked.carbon === null ? null : mwh * asked.carbon / 1e3};
};
const number = value => value === null || !isFinite(value) ? "unknown" : Math.abs(value) >= 1e6 ? [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"]]
  .filter(([size]) => Math.abs(value) >= size)[0].reduce((size, letter) => (value / size).toPrecision(4) + " " + letter) : Math.abs(value) >= 1000 ?
  Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
const shown = {goodput: value => value === null ? "unknown" : (100 * value).toFixed(1) + "\u00a0%"};
const form = document.getElementById("whatif");
const read = () => {
  const asked = {...given.base};
  for (const input of form.querySelectorAll("input")) {
    let value = Number(input.value);
    if (input.name === "count") value = Math.max(8, Math.round(Math.exp(value) / 8) * 8);
    if (input.name === "failures") value = Math.exp(value);
    if (input.dataset.moved === "yes") asked[input.name] = value;
    const own = asked[input.name];
    document.getElementById("said-" + input.name).textContent = number(own);
  }
  return asked;
};
const base = answer(given.base);
const update = () => {
  const found = answer(read());
  for (const key of Object.keys(base)) {
    const cell = document.getElementById("now-" + key), differs = document.getElementById("by-" + key);
    if (!cell) continue;
    cell.textContent = (shown[key] || number)(found[key]);
    const share = base[key] && found[key] !== null ? found[key] / base[key] - 1 : null;
    differs.textContent = share === null ? "" : Math.abs(share) < 5e-4 ? "as planned" : (share > 0 ? "+" : "\u2212") + (100 * Math.abs(share)).toFixed(1) + "\u00a0%";
  }
};
form.addEventListener("input", event => { event.target.dataset.moved = "yes"; update(); });
form.addEventListener("reset", () => { for (const input of form.querySelectorAll("input")) input.dataset.moved = ""; setTimeout(update, 0); });
form.hidden = false;
update();
