import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Locale;
import java.util.stream.IntStream;
import ko.sentence.SentenceEncoder;

/**
 * Prints sentences a second of examples/java as JSON, for measure_java.py.
 *
 * <pre>java -cp JAR MeasureJava.java MODEL.onnx THREADS SENTENCES.txt BATCH_SIZE ...</pre>
 */
public final class MeasureJava {
    public static void main(String[] arguments) throws Exception {
        List<String> texts = Files.readAllLines(Path.of(arguments[2]));
        StringBuilder found = new StringBuilder();
        try (SentenceEncoder encoder =
                SentenceEncoder.load(Path.of(arguments[0]), Integer.parseInt(arguments[1]))) {
            for (int i = 3; i < arguments.length; i++) {
                int size = Integer.parseInt(arguments[i]);
                int step = size == 1 ? 4 : 1; // one by one: a quarter of them
                List<String> used =
                        IntStream.range(0, texts.size())
                                .filter(place -> place % step == 0)
                                .mapToObj(texts::get)
                                .toList();
                lap(encoder, used.subList(0, used.size() / 2), size); // warms up
                double seconds = lap(encoder, used, size);
                found.append(found.isEmpty() ? "{" : ", ");
                found.append(
                        String.format(
                                Locale.ROOT, "\"batch_%d\": %.2f", size, used.size() / seconds));
            }
        }
        System.out.println(found.append("}"));
    }

    private static double lap(SentenceEncoder encoder, List<String> texts, int size) {
        long start = System.nanoTime();
        for (int place = 0; place < texts.size(); place += size) {
            encoder.encode(texts.subList(place, Math.min(place + size, texts.size())));
        }
        return (System.nanoTime() - start) / 1e9;
    }
}
