package ko.sentence;

import ai.djl.huggingface.tokenizers.Encoding;
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonParser;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.nio.charset.CharsetEncoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.locks.ReadWriteLock;
import java.util.concurrent.locks.ReentrantReadWriteLock;

/**
 * Embeds sentences with a file that onnx/export_onnx.py wrote.
 *
 * <p>Beside NAME.onnx lie NAME.json (the prompt, the longest input, the dimension) and
 * NAME.tokenizer.json (how text is cut, truncated and padded); nothing is downloaded. Threads may
 * share an encoder.
 */
public final class SentenceEncoder implements AutoCloseable {
    private static final String OUTPUT = "sentence_embedding";
    private static final int BATCH_SIZE = 32;
    private static final int WINDOW = 1024; // sentences that are tokenised and sorted together

    static {
        // Before DJL is loaded, which otherwise looks for a GPU's library and for the machine's name
        // in the network.
        System.setProperty("ai.djl.offline", "true");
    }

    private final Path path;
    private final String prompt;
    private final int dimension;
    private final long padId;
    private final long padTypeId;
    private final boolean padLeft;
    private final HuggingFaceTokenizer tokenizer;
    private final OrtSession session;
    private final ReadWriteLock lock = new ReentrantReadWriteLock(); // closing waits for encoding
    private boolean closed;

    private SentenceEncoder(
            Path path,
            JsonObject settings,
            JsonObject padding,
            HuggingFaceTokenizer tokenizer,
            OrtSession session) {
        this.path = path;
        this.prompt = settings.get("prompt").getAsString();
        this.dimension = settings.get("dimension").getAsInt();
        this.padId = padding.get("pad_id").getAsLong();
        this.padTypeId = padding.get("pad_type_id").getAsLong();
        this.padLeft = padding.get("direction").getAsString().equals("Left");
        this.tokenizer = tokenizer;
        this.session = session;
    }

    /**
     * Loads an exported file that computes with all cores.
     *
     * @param path NAME.onnx; NAME.json and NAME.tokenizer.json lie beside it
     * @throws IOException a file is missing, damaged or not of onnx/export_onnx.py; the message
     *     names it
     */
    public static SentenceEncoder load(Path path) throws IOException {
        return load(path, 0);
    }

    /**
     * Loads an exported file that computes with this many threads (0: as many as there are cores).
     *
     * @param path NAME.onnx; NAME.json and NAME.tokenizer.json lie beside it
     * @throws IOException a file is missing, damaged or not of onnx/export_onnx.py; the message
     *     names it
     */
    public static SentenceEncoder load(Path path, int threads) throws IOException {
        Path settingsFile = beside(path, ".json");
        Path tokenizerFile = beside(path, ".tokenizer.json");
        for (Path file : List.of(path, settingsFile, tokenizerFile)) {
            if (!Files.isRegularFile(file)) {
                throw new IOException(file + ": no such file; onnx/export_onnx.py writes three");
            }
        }
        // Not from the file's metadata, which hold the same: onnxruntime's Java garbles values with
        // characters outside the Basic Multilingual Plane, such as emoji.
        JsonObject settings = readJson(settingsFile);
        JsonObject definition = readJson(tokenizerFile);
        OrtSession session = null;
        HuggingFaceTokenizer tokenizer = null;
        try {
            session = openSession(path, threads);
            if (!session.getOutputNames().contains(OUTPUT)) {
                throw new IOException(path + ": no file of onnx/export_onnx.py: no " + OUTPUT);
            }
            for (String key : List.of("revision", "dimension", "max_seq_length")) {
                String value = session.getMetadata().getCustomMetadataValue(key).orElse("");
                if (!value.equals(settings.get(key).getAsString())) {
                    throw new IOException(settingsFile + ": is of another export than " + path);
                }
            }
            tokenizer = openTokenizer(tokenizerFile, settings.get("max_seq_length").getAsInt());
            JsonObject padding = definition.getAsJsonObject("padding");
            return new SentenceEncoder(path, settings, padding, tokenizer, session);
        } catch (IOException error) {
            close(tokenizer, session);
            throw error;
        } catch (OrtException | RuntimeException error) { // Gson's errors have no other base
            close(tokenizer, session);
            throw new IOException(path + ": no file of onnx/export_onnx.py", error);
        }
    }

    /** Returns the width of the embeddings. */
    public int dimension() {
        return dimension;
    }

    /**
     * Returns the embeddings of sentences, in their order, as the model gives them (of unit length
     * only where it normalises).
     *
     * <p>The model's prompt goes before each sentence. What is longer than the model's longest
     * input is cut at its end. Blank sentences get embeddings too. Text is not normalised here: in
     * NFD it gets what Python's tokenizers make of it.
     *
     * @param sentences none of them null, without unpaired surrogates; an empty list gives an empty
     *     array
     * @return float[sentences][dimension]
     * @throws IllegalArgumentException a sentence is null or is no Unicode text
     * @throws IllegalStateException the encoder is closed, or onnxruntime cannot run the file
     */
    public float[][] encode(List<String> sentences) {
        String[] texts = new String[sentences.size()];
        CharsetEncoder unicode = StandardCharsets.UTF_8.newEncoder();
        for (int i = 0; i < texts.length; i++) {
            String sentence = sentences.get(i);
            if (sentence == null || !unicode.canEncode(sentence)) {
                throw new IllegalArgumentException(
                        "sentence " + i + ": " + (sentence == null ? "null" : "unpaired surrogate"));
            }
            texts[i] = prompt + sentence;
        }
        float[][] embeddings = new float[texts.length][];
        lock.readLock().lock();
        try {
            if (closed) {
                throw new IllegalStateException(path + ": closed");
            }
            for (int start = 0; start < texts.length; start += WINDOW) {
                int end = Math.min(start + WINDOW, texts.length);
                Encoding[] tokens =
                        end - start == 1 // one needs no threads
                                ? new Encoding[] {tokenizer.encode(texts[start])}
                                : tokenizer.batchEncode(Arrays.copyOfRange(texts, start, end));
                float[][] found = encodeSorted(tokens);
                System.arraycopy(found, 0, embeddings, start, found.length);
            }
        } catch (OrtException error) {
            throw new IllegalStateException(path + ": " + error.getMessage(), error);
        } finally {
            lock.readLock().unlock();
        }
        return embeddings;
    }

    /** Releases the session and the tokenizer; waits for threads that encode. */
    @Override
    public void close() {
        lock.writeLock().lock();
        try {
            if (!closed) {
                closed = true;
                close(tokenizer, session);
            }
        } finally {
            lock.writeLock().unlock();
        }
    }

    // --- Batches -------------------------------------------------------------------------------

    /** Encodes sentences of like length together: less padding. */
    private float[][] encodeSorted(Encoding[] tokens) throws OrtException {
        List<Integer> order = new ArrayList<>();
        for (int i = 0; i < tokens.length; i++) {
            order.add(i);
        }
        order.sort(Comparator.comparingInt((Integer i) -> tokens[i].getIds().length).reversed());
        float[][] embeddings = new float[tokens.length][];
        for (int start = 0; start < order.size(); start += BATCH_SIZE) {
            List<Integer> batch =
                    order.subList(start, Math.min(start + BATCH_SIZE, order.size()));
            FloatBuffer values = run(batch.stream().map(i -> tokens[i]).toList());
            for (int i : batch) {
                embeddings[i] = new float[dimension];
                values.get(embeddings[i]);
            }
        }
        return embeddings;
    }

    /** Returns the embeddings of a batch, one after the other. */
    private FloatBuffer run(List<Encoding> batch) throws OrtException {
        int length = batch.get(0).getIds().length; // the longest is the first
        Map<String, OnnxTensor> feeds = new HashMap<>();
        try {
            // Models differ in their inputs: BERT has token types, RoBERTa has none.
            for (String name : session.getInputNames()) {
                LongBuffer values = LongBuffer.allocate(batch.size() * length);
                for (Encoding tokens : batch) {
                    long[] row =
                            switch (name) {
                                case "input_ids" -> tokens.getIds();
                                case "attention_mask" -> tokens.getAttentionMask();
                                case "token_type_ids" -> tokens.getTypeIds();
                                default -> throw new IllegalStateException(
                                        path + ": unknown input " + name);
                            };
                    long[] padded = new long[length];
                    Arrays.fill(padded, padding(name));
                    System.arraycopy(row, 0, padded, padLeft ? length - row.length : 0, row.length);
                    values.put(padded);
                }
                long[] shape = {batch.size(), length};
                feeds.put(
                        name,
                        OnnxTensor.createTensor(
                                OrtEnvironment.getEnvironment(), values.flip(), shape));
            }
            try (OrtSession.Result result = session.run(feeds)) {
                return ((OnnxTensor) result.get(OUTPUT).orElseThrow()).getFloatBuffer();
            }
        } finally {
            feeds.values().forEach(OnnxTensor::close);
        }
    }

    private long padding(String input) {
        return switch (input) {
            case "input_ids" -> padId;
            case "token_type_ids" -> padTypeId;
            default -> 0;
        };
    }

    // --- Files ---------------------------------------------------------------------------------

    private static Path beside(Path path, String ending) {
        String name = path.getFileName().toString().replaceFirst("\\.onnx$", "");
        return path.resolveSibling(name + ending);
    }

    private static JsonObject readJson(Path path) throws IOException {
        try {
            return JsonParser.parseString(Files.readString(path)).getAsJsonObject();
        } catch (JsonParseException | IllegalStateException | IOException error) {
            throw new IOException(path + ": no JSON of onnx/export_onnx.py", error);
        }
    }

    private static OrtSession openSession(Path path, int threads) throws IOException {
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.setIntraOpNumThreads(threads);
            return OrtEnvironment.getEnvironment().createSession(path.toString(), options);
        } catch (OrtException error) {
            throw new IOException(path + ": cannot be loaded: " + error.getMessage(), error);
        }
    }

    private static HuggingFaceTokenizer openTokenizer(Path path, int maxLength) throws IOException {
        // Padding is done here, for each batch. Without modelMaxLength DJL truncates at 512.
        Map<String, String> options =
                Map.of(
                        "padding", "false",
                        "truncation", "true",
                        "maxLength", String.valueOf(maxLength),
                        "modelMaxLength", String.valueOf(maxLength));
        try {
            return HuggingFaceTokenizer.newInstance(
                    new ByteArrayInputStream(Files.readAllBytes(path)), options);
        } catch (RuntimeException error) { // DJL's errors have no other base
            throw new IOException(path + ": cannot be loaded: " + error.getMessage(), error);
        }
    }

    private static void close(HuggingFaceTokenizer tokenizer, OrtSession session) {
        if (tokenizer != null) {
            tokenizer.close();
        }
        if (session != null) {
            try {
                session.close();
            } catch (OrtException error) {
                throw new IllegalStateException(error);
            }
        }
    }
}
