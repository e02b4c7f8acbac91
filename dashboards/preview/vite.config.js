// Everything the page asks for comes from one loopback address: Prometheus is behind /prometheus.
import { defineConfig } from 'vite';

const prometheus = {
  '/prometheus': {
    target: process.env.LABS_PROMETHEUS_URL || 'http://127.0.0.1:9090',
    rewrite: (path) => path.replace(/^\/prometheus/, ''),
  },
};
const server = {
  host: '127.0.0.1',
  port: Number(process.env.LABS_PREVIEW_PORT || 5173),
  strictPort: true,
  proxy: prometheus,
};

export default defineConfig({
  esbuild: { jsx: 'automatic' },
  build: { target: 'esnext', chunkSizeWarningLimit: 10000 },
  preview: server,
});
