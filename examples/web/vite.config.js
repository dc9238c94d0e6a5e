import { defineConfig } from "vite";

export default defineConfig({
  base: "./", // the build works in any folder of a server
  worker: { format: "es" },
  build: { chunkSizeWarningLimit: 1000 },
});
