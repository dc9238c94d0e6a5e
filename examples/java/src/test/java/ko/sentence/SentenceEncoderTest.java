package ko.sentence;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.abort;

import com.google.gson.Gson;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;

/** Tests with the exported files in onnx/models, or in another folder: {@code -Dmodels=FOLDER}. */
class SentenceEncoderTest {
    private static final Path MODELS = Path.of(System.getProperty("models", "../../onnx/models"));

    /** What `export_onnx.py --golden` writes. */
    record Golden(List<String> sentences, Map<String, float[][]> vectors) {}

    record Precision(String precision) {}

    private static List<Path> files(String ending) throws IOException {
        if (!Files.isDirectory(MODELS)) {
            return List.of();
        }
        try (Stream<Path> paths = Files.list(MODELS)) {
            return paths.filter(path -> path.toString().endsWith(ending)).sorted().toList();
        }
    }

    private static Path anyModel() throws IOException {
        List<Path> found = files(".onnx");
        return found.isEmpty()
                ? abort("no .onnx file in " + MODELS + ": run onnx/export_onnx.py, or -Dmodels=FOLDER")
                : found.get(0);
    }

    private static <T> T read(Path path, Class<T> type) throws IOException {
        return new Gson().fromJson(Files.readString(path), type);
    }

    private static double largestDifference(float[] first, float[] second) {
        assertEquals(first.length, second.length);
        double largest = 0;
        for (int i = 0; i < first.length; i++) {
            double difference = Math.abs((double) first[i] - second[i]);
            largest = difference <= largest ? largest : difference; // NaN is the largest
        }
        return largest;
    }

    private static double cosine(float[] first, float[] second) {
        double dot = 0;
        double ofFirst = 0;
        double ofSecond = 0;
        for (int i = 0; i < first.length; i++) {
            dot += (double) first[i] * second[i];
            ofFirst += (double) first[i] * first[i];
            ofSecond += (double) second[i] * second[i];
        }
        return dot / Math.sqrt(ofFirst * ofSecond);
    }

    // --- Python's vectors ----------------------------------------------------------------------

    static List<String> goldenVectors() throws IOException {
        List<String> found = new ArrayList<>();
        for (Path golden : files(".golden.json")) {
            for (String name : read(golden, Golden.class).vectors().keySet()) {
                found.add(golden.getFileName() + " " + name);
            }
        }
        return found.isEmpty() ? List.of("") : found;
    }

    @ParameterizedTest
    @MethodSource("goldenVectors")
    void vectorsEqualThoseOfPython(String names) throws IOException {
        if (names.isEmpty()) {
            abort("no .golden.json in " + MODELS + ": run onnx/export_onnx.py --golden");
        }
        Golden golden = read(MODELS.resolve(names.split(" ")[0]), Golden.class);
        Path model = MODELS.resolve(names.split(" ")[1]);
        float[][] expected = golden.vectors().get(names.split(" ")[1]);
        Path settings = Path.of(model.toString().replaceFirst("onnx$", "json"));
        String precision = read(settings, Precision.class).precision();
        try (SentenceEncoder encoder = SentenceEncoder.load(model)) {
            float[][] together = encoder.encode(golden.sentences());
            double largest = 0;
            for (int i = 0; i < expected.length; i++) {
                float[] alone = encoder.encode(List.of(golden.sentences().get(i)))[0];
                for (float[] found : List.of(together[i], alone)) {
                    double difference = largestDifference(found, expected[i]);
                    largest = Math.max(largest, difference);
                    if (precision.equals("fp32")) {
                        assertTrue(difference <= 1e-5, i + ": " + difference);
                    } else {
                        // Last bits differ between versions and CPUs; where a value lies between two
                        // steps of int8 they decide which it gets (tests/test_node.py).
                        assertTrue(cosine(found, expected[i]) > 0.995, i + ": " + difference);
                    }
                }
            }
            System.out.println(names + ": largest difference " + largest);
        }
    }

    // --- Sentences -----------------------------------------------------------------------------

    @Test
    void nothingGivesNothing() throws IOException {
        try (SentenceEncoder encoder = SentenceEncoder.load(anyModel())) {
            assertEquals(0, encoder.encode(List.of()).length);
        }
    }

    @Test
    void manySentencesOfAnyLengthKeepTheirOrder() throws IOException {
        List<String> sentences = new ArrayList<>();
        for (int i = 0; i < 1100; i++) {
            sentences.add(SemanticSearch.CORPUS.get(i % 9).substring(0, 1 + i % 8));
        }
        Collections.shuffle(sentences, new Random(0));
        try (SentenceEncoder encoder = SentenceEncoder.load(anyModel())) {
            float[][] found = encoder.encode(sentences);
            for (int i = 0; i < sentences.size(); i += 97) {
                float[] alone = encoder.encode(List.of(sentences.get(i)))[0];
                assertEquals(encoder.dimension(), alone.length);
                assertTrue(cosine(found[i], alone) > 0.9999, sentences.get(i));
            }
        }
    }

    @Test
    void whatIsTooLongIsCut() throws IOException {
        try (SentenceEncoder encoder = SentenceEncoder.load(anyModel())) {
            String text = "긴 문장 ".repeat(10_000);
            float[][] found = encoder.encode(List.of(text, text + "다른 끝"));
            assertArrayEquals(found[0], found[1], 1e-5f);
        }
    }

    @Test
    void whatIsNoSentenceIsNamed() throws IOException {
        try (SentenceEncoder encoder = SentenceEncoder.load(anyModel())) {
            for (String bad : Arrays.asList(null, "가\uD83D나")) {
                Exception error =
                        assertThrows(
                                IllegalArgumentException.class,
                                () -> encoder.encode(Arrays.asList("가", bad)));
                assertTrue(error.getMessage().startsWith("sentence 1: "), error.getMessage());
            }
        }
    }

    // --- Threads and closing -------------------------------------------------------------------

    @Test
    void threadsShareAnEncoder() throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(8);
        try (SentenceEncoder encoder = SentenceEncoder.load(anyModel())) {
            float[][] expected = encoder.encode(SemanticSearch.CORPUS);
            List<Callable<float[][]>> work =
                    Collections.nCopies(16, () -> encoder.encode(SemanticSearch.CORPUS));
            for (Future<float[][]> found : threads.invokeAll(work)) {
                for (int i = 0; i < expected.length; i++) {
                    assertArrayEquals(expected[i], found.get()[i], 1e-6f);
                }
            }
        } finally {
            threads.shutdown();
        }
    }

    @Test
    void closingWaitsForThreadsAndEndsEncoding() throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(2);
        SentenceEncoder encoder = SentenceEncoder.load(anyModel());
        try {
            List<Future<Integer>> running = new ArrayList<>();
            for (int i = 0; i < 20; i++) {
                running.add(threads.submit(() -> encoder.encode(SemanticSearch.CORPUS).length));
            }
            running.get(0).get();
            encoder.close();
            encoder.close();
            for (Future<Integer> one : running) {
                try {
                    assertEquals(9, one.get());
                } catch (ExecutionException error) { // began after closing
                    assertEquals(IllegalStateException.class, error.getCause().getClass());
                }
            }
            assertThrows(IllegalStateException.class, () -> encoder.encode(List.of("가")));
        } finally {
            threads.shutdown();
        }
    }

    // --- Files ---------------------------------------------------------------------------------

    private static String errorOf(Path path) {
        return assertThrows(IOException.class, () -> SentenceEncoder.load(path)).getMessage();
    }

    @Test
    void aMissingFileIsNamed(@TempDir Path folder) throws IOException {
        Path model = folder.resolve("model.onnx");
        String end = ": no such file; onnx/export_onnx.py writes three";
        for (String name : List.of("model.onnx", "model.json", "model.tokenizer.json")) {
            assertEquals(folder.resolve(name) + end, errorOf(model));
            Files.writeString(folder.resolve(name), "");
        }
    }

    @ParameterizedTest
    @CsvSource({
        "model.onnx, not a model, cannot be loaded",
        "model.json, {, no JSON of onnx/export_onnx.py",
        "model.json, [1], no JSON of onnx/export_onnx.py",
        "model.json, {}, no file of onnx/export_onnx.py",
        "model.json, '{\"revision\": \"other\"}', is of another export",
        "model.json, '{\"revision\": []}', no file of onnx/export_onnx.py",
        "model.tokenizer.json, {}, cannot be loaded",
    })
    void aDamagedOrForeignFileIsNamed(String name, String content, String says, @TempDir Path folder)
            throws IOException {
        Path whole = anyModel();
        String stem = whole.toString().replaceFirst("\\.onnx$", "");
        for (String ending : List.of(".onnx", ".json", ".tokenizer.json")) {
            Files.copy(Path.of(stem + ending), folder.resolve("model" + ending));
        }
        Files.writeString(folder.resolve(name), content);
        String message = errorOf(folder.resolve("model.onnx"));
        assertTrue(message.contains(says) && message.contains("model."), message);
        assertEquals(1, message.lines().count(), message);
    }
}
