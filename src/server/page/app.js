"use strict";
const place = document.getElementById("cache");
fetch("v1/cache")
  .then((answer) => answer.json())
  .then((cache) => { place.textContent = JSON.stringify(cache, null, 2); })
  .catch((error) => { place.textContent = String(error); });
